"""The processes that read ahead."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import threading
from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from soratrain.batch import Batch
from soratrain.data.dataset import MicroBatches
from soratrain.distributed import halt
from soratrain.errors import DataError, UserError

KILLED = re.compile(r"DataLoader worker.* (is killed by signal|exited unexpectedly)")


class Span(Sampler[int]):
    """Micro-batch numbers from `start` up to `end`; its length is `end`, since Lightning counts from the beginning."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end


class Outcomes(Dataset):
    """Micro-batches by number, or the error that the user can mend: raised in a worker it would lose its message."""

    def __init__(self, items: MicroBatches) -> None:
        self.items = items

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self.items[number]
        except UserError as error:
            return error


class Loader(DataLoader[Batch]):
    """A DataLoader that raises in this process what a worker hands over as an error, after all ranks know of it."""

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        halt.watch()
        outcomes = super().__iter__()
        while True:
            try:
                outcome = next(outcomes)
            except StopIteration:
                return
            except RuntimeError as error:
                if not KILLED.search(str(error)):
                    raise
                outcome = DataError(
                    f"a loader process was killed ({' '.join(str(error).split())}). Mostly that is for want of memory:"
                    " fewer data.workers, a smaller data.prefetch or data.cache need less; the same command goes on"
                )
                outcome.__cause__ = error
            if isinstance(outcome, UserError):
                halt.announce(str(outcome))
                raise outcome
            yield outcome


def serve(environment: Mapping[str, str], worker: int) -> None:
    """Live as long as the process that trains, in its environment.

    The server that forks has the environment of its own start, perhaps before credentials were set.

    Ctrl-C, which a terminal sends to every process, is left to that one: it still wants its batches. And where it is
    killed, this one ends too; PyTorch looks at the parent, which is the server that forks, and that outlives it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(environment)
    trainer = multiprocessing.parent_process()
    assert trainer is not None

    def end() -> None:
        multiprocessing.connection.wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=end, name="parent", daemon=True).start()


def make_loader(items: MicroBatches, start: int, end: int, *, workers: int, prefetch: int) -> DataLoader[Batch]:
    """Return a loader of micro-batches `start` up to `end`, in order, whatever the number of `workers`."""
    if workers:  # import once, before workers fork off
        multiprocessing.set_forkserver_preload([MicroBatches.__module__])
    return Loader(
        Outcomes(items),  # type: ignore[arg-type]
        batch_size=None,
        sampler=Span(start, end),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=partial(serve, dict(os.environ)) if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, or the loader would move on the global one
    )
