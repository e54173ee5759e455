"""Latents to tokens and back, in raster order t, y, x; channel order as Wan's, so that its weights map.

Legend: C latent channels, t h w latent size, pt ph pw patch, n tokens of one latent.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor

from soratrain.errors import ConfigError

STRIDE = (4, 8, 8)  # frames, rows and columns of pixels under one latent position
Patch = tuple[int, int, int]


def grid_of(latent: Tensor, patch: Patch) -> tuple[int, int, int]:
    """Return how many tokens a latent `[C, t, h, w]` has along t, y and x.

    Raises:
        ConfigError: the latent is no whole number of patches.
    """
    size = tuple(latent.shape[-3:])
    if any(length % part for length, part in zip(size, patch, strict=True)):
        raise ConfigError(
            f"a latent of {size[0]}x{size[1]}x{size[2]} is no whole number of dit.patch={list(patch)} patches; use"
            " another patch, or encode with buckets whose sizes fit it"
        )
    return size[0] // patch[0], size[1] // patch[1], size[2] // patch[2]


def patchify(latent: Tensor, patch: Patch) -> Tensor:
    """Return a latent `[C, t, h, w]` as input tokens `[n, (C pt ph pw)]`."""
    grid_of(latent, patch)
    pt, ph, pw = patch
    return rearrange(latent, "c (t pt) (h ph) (w pw) -> (t h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)


def patchify_target(latent: Tensor, patch: Patch) -> Tensor:
    """Return a latent `[C, t, h, w]` as output tokens `[n, (pt ph pw C)]`: what a perfect net would give."""
    grid_of(latent, patch)
    pt, ph, pw = patch
    return rearrange(latent, "c (t pt) (h ph) (w pw) -> (t h w) (pt ph pw c)", pt=pt, ph=ph, pw=pw)


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch: Patch) -> Tensor:
    """Return output tokens `[n, (pt ph pw C)]` as the latent `[C, t, h, w]`."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return rearrange(
        tokens, "(t h w) (pt ph pw c) -> c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
    ).contiguous()


def coordinates(
    grid: tuple[int, int, int], patch: Patch, fps: float, origin: tuple[float, float, float], rope_time: str
) -> Tensor:
    """Return each token's place `[n, 3]` (time, row, column), fp32.

    Rows and columns count tokens. Time counts latent steps at 24 fps, that is seconds x 6, so that frame rates mix; or,
    where `rope_time` is `index`, latent steps whatever the rate.

    Args:
        grid: tokens along t, y and x.
        patch: patch size in latent positions.
        fps: frames per second of the pixels.
        origin: place of the first token: seconds (or latent steps where `rope_time` is `index`), row and column.
        rope_time: `seconds` or `index`.
    """
    assert rope_time in ("seconds", "index"), f"no rope_time {rope_time!r}"
    seconds = rope_time == "seconds"
    rate = 6.0 if seconds else 1.0
    step = patch[0] * (STRIDE[0] / fps if seconds else 1.0)
    times = (torch.arange(grid[0], dtype=torch.float32) * step + origin[0]) * rate
    rows = torch.arange(grid[1], dtype=torch.float32) + origin[1]
    columns = torch.arange(grid[2], dtype=torch.float32) + origin[2]
    return torch.stack(torch.meshgrid(times, rows, columns, indexing="ij"), dim=-1).reshape(-1, 3)
