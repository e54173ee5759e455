"""The processes that read ahead."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Sampler

from soratrain.batch import Batch
from soratrain.data.dataset import MicroBatches


class Span(Sampler[int]):
    """Micro-batch numbers from `start` up to `end`; its length is `end`, since Lightning counts from the beginning."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end


def make_loader(items: MicroBatches, start: int, end: int, *, workers: int, prefetch: int) -> DataLoader[Batch]:
    """Return a loader of micro-batches `start` up to `end`, in order, whatever the number of `workers`."""
    if workers:  # import once, before workers fork off
        multiprocessing.set_forkserver_preload([MicroBatches.__module__])
    return DataLoader(
        items,
        batch_size=None,
        sampler=Span(start, end),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        generator=torch.Generator(),  # its own, or the loader would move on the global one
    )
