"""The typed batches that pass from the loader to the stages, and the randomness that travels with them.

Legend: B samples, T frames, H height, W width, C channels. Every random number a stage uses comes from a sample's
`draw` (a 63-bit hash of seed, step and sample key), so results depend neither on rank, worker nor place in a batch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor


def draw_of(*parts: object) -> int:
    """Return a 63-bit hash of `parts`: the seed of everything random about one sample at one step."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def _generator(draw: int, stream: str, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(draw_of(draw, stream))


def keyed_normal(draw: int, stream: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """Return standard normal fp32 noise of `shape` that depends on `draw` and the name `stream` alone.

    It is drawn on the CPU and moved, so that every device sees the same numbers.
    """
    return torch.randn(tuple(shape), generator=_generator(draw, stream, torch.device("cpu"))).to(device)


def keyed_uniform(draw: int, stream: str, shape: Sequence[int] = ()) -> Tensor:
    """Return fp32 numbers in [0, 1) of `shape` that depend on `draw` and the name `stream` alone."""
    return torch.rand(tuple(shape), generator=_generator(draw, stream, torch.device("cpu")))


def to_pixels(video: Tensor) -> Tensor:
    """Return uint8 `B T H W C` as float32 `B C T H W` in [-1, 1]."""
    return video.permute(0, 4, 1, 2, 3).float().div_(127.5).sub_(1.0)


def to_uint8(video: Tensor) -> Tensor:
    """Return float `B C T H W` in [-1, 1] as uint8 `B T H W C`, clamped and rounded."""
    return video.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 4, 1).contiguous()


def _each(value: Any, act: Callable[[Tensor], Tensor]) -> Any:
    """Return a field of a batch with `act` done to every tensor in it."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, tuple):
        return tuple(_each(item, act) for item in value)
    if isinstance(value, Mapping):
        return {key: _each(item, act) for key, item in value.items()}
    return value


@dataclass(frozen=True)
class Batch:
    """What every micro-batch carries.

    Attributes:
        keys: sample keys, one a sample.
        captions: the caption chosen for each sample.
        fps: frames per second `[B]`, fp32.
        weights: loss weight of each sample `[B]`, fp32; over all micro-batches of an optimizer step they sum to 1.
        draws: 63-bit seeds `[B]`, int64.
        scale: micro-batches in an optimizer step over all ranks; undoes the averaging over them.
        styles: the type of each chosen caption (`short`, `long`, `gt`, …), or empty where nothing was chosen by type.
        sources: where each caption is from, `synthetic` or `original`, or empty like `styles`.
    """

    keys: tuple[str, ...]
    captions: tuple[str, ...]
    fps: Tensor
    weights: Tensor
    draws: Tensor
    scale: float
    styles: tuple[str, ...] = field(default=(), kw_only=True)
    sources: tuple[str, ...] = field(default=(), kw_only=True)

    def __len__(self) -> int:
        return len(self.keys)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Return the batch with its tensors on `device`; `draws` stay on the CPU, where they seed generators."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        moved = {item.name: _each(getattr(self, item.name), move) for item in fields(self) if item.name != "draws"}
        return replace(self, **moved)

    def pin_memory(self) -> Self:
        """Return the batch with its tensors in page-locked memory, from which copies to a GPU need not wait."""
        return replace(self, **{item.name: _each(getattr(self, item.name), Tensor.pin_memory) for item in fields(self)})

    def normal(self, stream: str, shapes: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> list[Tensor]:
        """Return one normal tensor a sample, of the given shapes."""
        return [
            keyed_normal(int(draw), stream, shape, device)
            for draw, shape in zip(self.draws.tolist(), shapes, strict=True)
        ]

    def uniform(self, stream: str) -> Tensor:
        """Return one number in [0, 1) a sample, `[B]`."""
        return torch.stack([keyed_uniform(int(draw), stream) for draw in self.draws.tolist()])

    def mean(self, losses: Tensor) -> Tensor:
        """Return the micro-batch's loss from per-sample `losses` `[B]`.

        Averaged over ranks and accumulated micro-batches, as trainers do, it gives the weighted mean over the step.
        """
        return (losses.float() * self.weights).sum() * self.scale


@dataclass(frozen=True)
class VideoBatch(Batch):
    """Clips of one size and length.

    Attributes:
        video: uint8 `[B, T, H, W, 3]`.
    """

    video: Tensor

    def pixels(self) -> Tensor:
        """Return fp32 `[B, 3, T, H, W]` in [-1, 1]."""
        return to_pixels(self.video)


def random_crop(batch: VideoBatch, size: int) -> Tensor:
    """Return `[B, T, h, w, 3]`, h and w at most `size`, cut out of each clip where its draw says."""
    _, _, height, width, _ = batch.video.shape
    h, w = min(size, height), min(size, width)
    tops = (batch.uniform("crop top") * (height - h + 1)).long().tolist()
    lefts = (batch.uniform("crop left") * (width - w + 1)).long().tolist()
    parts = zip(batch.video, tops, lefts, strict=True)
    return torch.stack([video[:, top : top + h, left : left + w] for video, top, left in parts])


@dataclass(frozen=True)
class LatentBatch(Batch):
    """Cached latents; of one shape in bucket mode, of any shapes in a pack.

    Attributes:
        latents: normalised latents, one `[C, t, h, w]` a sample.
        text: what stage=encode stored of each sample's caption, features `[L, D]` or tokens of `byte`
            (`TextTokens.joined`), None for one of which nothing is stored; empty where that is so of all.
        tails: of each sample, by their number N, its last N frames encoded standalone `[C, t', h, w]`: those that were
            asked for, as far as they are stored; empty where none were asked for.
    """

    latents: tuple[Tensor, ...]
    text: tuple[Tensor | None, ...] = ()
    tails: tuple[Mapping[int, Tensor], ...] = ()
