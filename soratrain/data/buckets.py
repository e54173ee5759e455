"""Which samples can share a batch: buckets of one height, width and number of frames, chosen from metadata alone.

A clip goes to a bucket that is not larger and not longer than it is, so nothing is ever upsampled or slowed down.
Legend: a bucket's T is 1 + 4k frames and its H and W are multiples of 16 (VAE stride 8 × patch 2).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.fitting import GRID, TIME, distinct, merge_rare, nearest, on_grid
from soratrain.data.manifest import Manifest
from soratrain.errors import ConfigError, DataError

# Of a block, what a bucket must fill to stay: merging costs pixels or frames of its samples, not merging costs smaller
# batches, which are slower.
FILL = 0.25


BlockSize = Callable[[Bucket], int]  # samples that one full block of a bucket holds, over all ranks


class Buckets(Protocol):
    """A way to put samples into buckets."""

    def assign(self, manifest: Manifest, block: BlockSize, least: int = 1) -> Assignment:
        """Return the buckets of `manifest`; a block wants `block(bucket)` samples, and needs `least`."""
        ...


def parse_size(text: str) -> tuple[int, int]:
    """Return (height, width) of `WIDTHxHEIGHT`. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)", str(text))
    if not match:
        raise ConfigError(f"size {text!r} is not WIDTHxHEIGHT; write 832x480, say")
    return int(match[2]), int(match[1])


class Native:
    """Buckets derived from the samples themselves, rounded down to the grid; rare ones merge into a neighbour.

    Args:
        max_size: `WIDTHxHEIGHT`; frames of a larger area are scaled down to it at their own aspect ratio.
        max_frames: longer clips are cut to this many frames.
        max_fps: clips of a higher rate are taken at an integer fraction of it, the largest not above this.
        grid: pixels of which both sides are multiples: what the VAE's stride and the DiT's patch make together.
        square: cut every frame to a square, as image models are often trained; for comparison.
    """

    def __init__(
        self,
        *,
        max_size: str | None = None,
        max_frames: int | None = None,
        max_fps: float | None = None,
        grid: int = GRID,
        square: bool = False,
    ) -> None:
        height, width = parse_size(max_size) if max_size is not None else (0, 0)
        if grid < GRID or grid % GRID:
            raise ConfigError(f"buckets.grid={grid}: must be {GRID} or a multiple of it")
        if max_size is not None and min(height, width) < grid:
            raise ConfigError(f"buckets.max_size={max_size}: each side must be at least {grid} pixels")
        if max_frames is not None and max_frames < 1:
            raise ConfigError(f"buckets.max_frames={max_frames}: must be 1, or more")
        self.area = height * width or None
        self.max_frames, self.max_fps, self.grid, self.square = max_frames, max_fps, grid, square

    def assign(self, manifest: Manifest, block: BlockSize, least: int = 1) -> Assignment:
        """Return the buckets of `manifest`, each holding a good part of `block(bucket)` samples where that can be."""
        stride, frames = _frames(manifest, self.max_fps)
        sizes, size_of, _ = distinct(np.stack([manifest.h.astype(np.int64), manifest.w.astype(np.int64), frames], 1))
        small = (sizes[:, :2].min(1) < self.grid) | (sizes[:, 2] < 1)
        cells = np.empty_like(sizes)
        sides = np.broadcast_to(sizes[:, :2].min(1, keepdims=True), (len(sizes), 2)) if self.square else sizes[:, :2]
        cells[:, 0], cells[:, 1] = on_grid(sides[:, 0], sides[:, 1], self.area, self.grid)
        cells[:, 2] = 1 + (np.minimum(sizes[:, 2], self.max_frames or sizes[:, 2]) - 1) // TIME * TIME
        used = np.flatnonzero(~small[size_of])
        names, cell_of, _ = distinct(cells[~small])
        place = np.cumsum(~small) - 1  # of each size among those that are large enough
        which = cell_of[place[size_of[used]]]
        counts = np.bincount(which, minlength=len(names))
        buckets = [Bucket(*map(int, name)) for name in names]
        full = np.array([block(bucket) for bucket in buckets])
        parent, merged, held = merge_rare(names, counts, np.maximum(least, np.ceil(full * FILL)))
        dropped = {f"smaller than {self.grid} pixels": len(manifest) - len(used)} if small.any() else {}
        return _assignment(
            buckets,
            used,
            parent[which],
            stride,
            merged=tuple((buckets[cell], buckets[target], count) for cell, target, count in merged),
            rare=tuple(buckets[cell] for cell in np.flatnonzero((held > 0) & (held < full))),
            dropped=dropped,
        )


class Table:
    """Buckets from a list written by hand. A clip goes to the nearest aspect ratio, then the largest that fits.

    Args:
        table: `WIDTHxHEIGHTxFRAMES`, one a bucket.
        max_fps: as for Native.
    """

    def __init__(self, *, table: Sequence[str], max_fps: float | None = None) -> None:
        if not table:
            raise ConfigError("buckets.table is empty; list sizes as WIDTHxHEIGHTxFRAMES")
        self.buckets = sorted({parse_bucket(entry) for entry in table})
        self.max_fps = max_fps

    def assign(self, manifest: Manifest, block: BlockSize, least: int = 1) -> Assignment:
        """Put the samples of `manifest` into the listed buckets.

        Raises ConfigError for a bucket that has samples, but fewer than `least`.
        """
        stride, frames = _frames(manifest, self.max_fps)
        sizes = np.stack([manifest.h.astype(np.int64), manifest.w.astype(np.int64), frames], 1)
        groups, which, _ = distinct(sizes)
        best = nearest(groups, np.array(self.buckets, dtype=np.int64))[which]
        used = np.flatnonzero(best >= 0)
        numbers, counts = np.unique(best[used], return_counts=True)
        found = [(self.buckets[number], int(count)) for number, count in zip(numbers, counts, strict=True)]
        for bucket, count in found:
            if count < least:
                raise ConfigError(
                    f"bucket {bucket} has {count} samples, fewer than the {least} ranks that share a"
                    " block; take it out of buckets.table"
                )
        still = frames < 1 + TIME
        reasons = {"still smaller than every image bucket": still, "clip smaller or shorter than every bucket": ~still}
        dropped = {reason: int(((best < 0) & mask).sum()) for reason, mask in reasons.items()}
        kept = {reason: count for reason, count in dropped.items() if count}
        rare = tuple(bucket for bucket, count in found if count < block(bucket))
        return _assignment(self.buckets, used, best[used], stride, rare=rare, dropped=kept)


class Stored:
    """The buckets of latents: each latent's own shape, which can no longer change."""

    def assign(self, manifest: Manifest, block: BlockSize, least: int = 1) -> Assignment:
        """Group `manifest` by size. Raises DataError for a size that no latent can have."""
        cells = np.stack([manifest.h, manifest.w, manifest.frames], 1).astype(np.int64)
        wrong = (cells[:, :2] % GRID).any(1) | (cells[:, 2] % TIME != 1) | (cells <= 0).any(1)
        if wrong.any():
            row = manifest.row(int(np.flatnonzero(wrong)[0]))
            raise DataError(
                f"{manifest.folder}: latent {row.key} of {row.w}x{row.h}x{row.frames} is off the grid of {GRID} pixels"
                f" and 1+{TIME}k frames; encode again"
            )
        names, which, counts = distinct(cells)
        buckets = [Bucket(*map(int, name)) for name in names]
        rare = tuple(name for name, count in zip(buckets, counts, strict=True) if count < block(name))
        stride = np.ones(len(manifest), dtype=np.int64)
        return _assignment(buckets, np.arange(len(manifest)), which, stride, rare=rare)


def parse_bucket(text: str) -> Bucket:
    """Return the bucket that `WIDTHxHEIGHTxFRAMES` names. Raises ConfigError where it is off the grid."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", str(text))
    if not match:
        raise ConfigError(f"buckets.table: {text!r} is not WIDTHxHEIGHTxFRAMES; write 832x480x49, say")
    width, height, frames = map(int, match.groups())
    if not (height and width and frames) or height % GRID or width % GRID or frames % TIME != 1:
        raise ConfigError(
            f"buckets.table: {text} is off the grid; width and height are multiples of {GRID}, frames are 1+{TIME}k"
        )
    return Bucket(height, width, frames)


def _frames(manifest: Manifest, max_fps: float | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the frame stride and the frames that are left at it; a clip under 1 + TIME frames counts as a still."""
    fps = manifest.fps_num / np.maximum(manifest.fps_den, 1)
    stride = np.maximum(1, np.ceil(fps / max_fps - 1e-6)) if max_fps else np.ones(len(manifest))
    stride = np.where(manifest.image, 1, stride).astype(np.int64)
    return stride, 1 + (manifest.frames.astype(np.int64) - 1) // stride


def _assignment(
    buckets: Sequence[Bucket],
    used: np.ndarray,
    which: np.ndarray,
    stride: np.ndarray,
    *,
    merged: tuple[tuple[Bucket, Bucket, int], ...] = (),
    rare: tuple[Bucket, ...] = (),
    dropped: dict[str, int] | None = None,
) -> Assignment:
    if not len(used):
        raise DataError(
            f"no sample fits a bucket: {dropped or 'the manifest is empty'}; look at buckets and the shards"
        )
    which = which.astype(np.uint16 if len(buckets) < 1 << 16 else np.int64)  # 16 bits are sorted in linear time
    order, counts = np.argsort(which, kind="stable"), np.bincount(which)
    numbers = np.flatnonzero(counts).tolist()
    members = tuple(np.split(used[order], np.cumsum(counts[numbers])[:-1]))
    return Assignment(
        buckets=tuple(buckets[number] for number in numbers),
        members=members,
        rates=tuple(float(len(part)) for part in members),
        stride=stride,
        merged=merged,
        rare=rare,
        dropped=dropped or {},
    )
