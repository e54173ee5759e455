"""Samplers: from noise to a clean latent along a velocity. Pure functions; the net is a callable.

`velocity(x, sigma)` returns dx/dsigma at one noise level for the whole `x`; `x` is any tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x: Tensor, sigmas: Tensor, free: Tensor | None = None) -> Tensor:
    """Return `x` carried from `sigmas[0]` to `sigmas[-1]` by Euler steps.

    Args:
        velocity: of the flow.
        x: the start; where `free` is false it is known and comes back bit for bit.
        sigmas: falling noise levels `[steps + 1]`.
        free: bool, broadcasts against `x`; None where all of it is drawn.
    """
    levels = sigmas.tolist()
    for now, after in pairwise(levels):
        moved = x + (after - now) * velocity(x, now)
        x = moved if free is None else torch.where(free, moved, x)
    return x


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return classifier-free guidance's mix; scale 1 is the conditional alone (Ho and Salimans, 2022)."""
    return unconditional + scale * (conditional - unconditional)
