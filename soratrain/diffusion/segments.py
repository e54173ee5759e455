"""Samples as lists of segments, flattened into one pack of tokens: one mechanism for every way to condition.

Text to video is one noisy segment. A known segment is clean (sigma 0), gives no loss, and is seen by the others: a
prefix extends forwards, a suffix backwards, both connect. All segments of a sample share one attention block.

Legend: n tokens of one segment, N tokens of the pack, P channels of a patch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from soratrain.models.attention import Packing
from soratrain.models.patchify import Patch, coordinates, grid_of, patchify, unpatchify
from soratrain.models.tokens import Tokens

KNOWN, STANDALONE = 1, 2  # bits of a token's flags
CACHED = 128  # shapes and places of segments; of 75,000 tokens each they take 180 MiB


@dataclass(frozen=True)
class Segment:
    """A stretch of latents with a place in time and space.

    Attributes:
        latent: `[C, t, h, w]`, already noised as `sigma` says.
        sigma: noise level: a scalar, or one a token `[n]`.
        fps: frames per second of the pixels.
        origin: place of the first token: seconds (latent steps where the net counts those), token row, token column.
        known: whether it is given: one bool, or one a token `[n]`.
        standalone: whether its first latent frame was encoded with nothing before it, as a clip's first frame is.
        loss_mask: which tokens `[n]` are supervised; None means those that are not known.
    """

    latent: Tensor
    sigma: Tensor
    fps: float
    origin: tuple[float, float, float] = (0.0, 0.0, 0.0)
    known: Tensor | bool = False
    standalone: bool = True
    loss_mask: Tensor | None = None


@dataclass(frozen=True)
class Flat:
    """A pack, and how to take it apart.

    Attributes:
        tokens: what the net reads.
        loss_mask: supervised tokens `[N]`, fp32, 1 or 0.
        grids: tokens along t, y, x of every segment, in order.
        counts: segments of each sample.
        patch: patch size.
    """

    tokens: Tokens
    loss_mask: Tensor
    grids: tuple[tuple[int, int, int], ...]
    counts: tuple[int, ...]
    patch: Patch

    def unflatten(self, out: Tensor) -> list[list[Tensor]]:
        """Return output tokens `[N, (pt ph pw C)]` as each sample's segments `[C, t, h, w]`."""
        parts = out.split([grid[0] * grid[1] * grid[2] for grid in self.grids])
        latents = iter([unpatchify(part, grid, self.patch) for part, grid in zip(parts, self.grids, strict=True)])
        return [[next(latents) for _ in range(count)] for count in self.counts]

    def mean(self, losses: Tensor) -> Tensor:
        """Return each sample's mean over its supervised tokens of `losses` `[N]`, `[B]`, fp32."""
        packing = self.tokens.packing
        supervised = packing.mean(self.loss_mask)
        return packing.mean(losses.float() * self.loss_mask) / supervised.clamp(min=1e-12)


@lru_cache(maxsize=CACHED)
def _places(
    grid: tuple[int, int, int], patch: Patch, fps: float, origin: tuple[float, float, float], rope_time: str
) -> Tensor:
    return coordinates(grid, patch, fps, origin, rope_time)


@lru_cache(maxsize=CACHED)
def _flags(grid: tuple[int, int, int], known: bool, standalone: bool) -> Tensor:
    flags = torch.full((grid[0], grid[1] * grid[2]), KNOWN if known else 0)
    flags[0] |= STANDALONE if standalone else 0
    return flags.flatten()


def flatten(samples: Sequence[Sequence[Segment]], patch: Patch, rope_time: str = "seconds") -> Flat:
    """Return samples as one pack.

    Args:
        samples: each a list of segments; sizes and lengths may all differ.
        patch: latent positions of one token along t, y and x.
        rope_time: how the net counts time: `seconds` or `index`.

    Raises:
        ValueError: a latent is no whole number of patches.
    """
    segments = [segment for sample in samples for segment in sample]
    device = segments[0].latent.device
    grids = tuple(grid_of(segment.latent, patch) for segment in segments)
    sizes = [grid[0] * grid[1] * grid[2] for grid in grids]
    counts = tuple(len(sample) for sample in samples)
    owners = [index for index, count in enumerate(counts) for _ in range(count)]
    lengths = [0] * len(samples)
    for owner, size in zip(owners, sizes, strict=True):
        lengths[owner] += size
    flags, places, masks = [], [], []
    for segment, grid, size in zip(segments, grids, sizes, strict=True):
        known = segment.known
        flag = _flags(grid, known is True, segment.standalone)
        flags.append(flag if isinstance(known, bool) else flag | known.cpu().long() * KNOWN)
        places.append(_places(grid, patch, float(segment.fps), segment.origin, rope_time))
        free = torch.full((size,), not known) if isinstance(known, bool) else ~known.cpu()
        masks.append(free if segment.loss_mask is None else segment.loss_mask.cpu())
    sigma, row_clips, rows = _rows(segments, sizes, owners, lengths)
    tokens = Tokens(
        values=torch.cat([patchify(segment.latent, patch) for segment in segments]),
        coords=torch.cat(places).to(device),
        flags=torch.cat(flags).to(device),
        packing=Packing(tuple(lengths)),
        sigma=sigma.to(device),
        row_clips=row_clips.to(device),
        rows=None if rows is None else rows.to(device),
    )
    return Flat(tokens, torch.cat(masks).float().to(device), grids, counts, patch)


def _rows(
    segments: Sequence[Segment], sizes: Sequence[int], owners: Sequence[int], lengths: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the noise level and the sample of each row, and the row of each token (None: a row a sample)."""
    levels, clips, rows, count = [], [], [], 0
    for segment, size, owner in zip(segments, sizes, owners, strict=True):
        sigma = torch.as_tensor(segment.sigma, dtype=torch.float32).cpu()
        distinct, inverse = (
            (sigma.reshape(1), torch.zeros(size, dtype=torch.int64))
            if sigma.numel() == 1
            else sigma.unique(return_inverse=True)
        )
        levels.append(distinct)
        clips.extend([owner] * len(distinct))
        rows.append(inverse + count)
        count += len(distinct)
    plain = count == len(lengths) and len(segments) == len(lengths)
    return torch.cat(levels), torch.tensor(clips), None if plain else torch.cat(rows)
