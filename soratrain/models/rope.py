"""Rotary position embedding on float coordinates, in any number of axes (Su et al., 2021; 3D split as Wan, 2025).

Legend: N tokens, A axes, H heads, K head dim. Angles are fp32 whatever the tokens' dtype.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

THETA = 10_000.0  # sets the longest wavelength (Su et al., 2021)


def split_axes(head_dim: int) -> tuple[int, int, int]:
    """Return how many of `head_dim` channels turn with time, height and width: a third each, time taking the rest.

    Raises:
        ValueError: `head_dim` is odd or leaves an axis without a pair of channels.
    """
    side = 2 * (head_dim // 6)
    if head_dim % 2 or not side:
        raise ValueError(f"3D rotary embedding needs an even head dim of at least 6, not {head_dim}")
    return head_dim - 2 * side, side, side


def rotations(coords_NA: Tensor, channels: Sequence[int], theta: float = THETA) -> Tensor:
    """Return the cosine and sine `[N, 1, K/2, 2]` of the angle by which each pair of channels turns.

    The fastest pair of an axis turns by 1 rad per unit of its coordinate.

    Args:
        coords_NA: coordinates, any floats.
        channels: channels of each axis, all even; they sum to K.
    """
    angles = []
    for axis, count in enumerate(channels):
        steps = torch.arange(0, count, 2, device=coords_NA.device, dtype=torch.float32) / count
        angles.append(coords_NA[:, axis, None].float() * theta**-steps)
    angle = torch.cat(angles, dim=1)[:, None]
    return torch.stack((angle.cos(), angle.sin()), dim=-1)


def rotate(x_NHK: Tensor, rotation: Tensor) -> Tensor:
    """Turn each pair of adjacent channels in fp32 and return the result in `x_NHK`'s dtype.

    As complex numbers, which is fewer passes over memory; a compiler, which knows none, gets it in real ones.
    """
    pairs = x_NHK.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        (x, y), (cos, sin) = pairs.unbind(-1), rotation.unbind(-1)
        turned = torch.stack((x * cos - y * sin, x * sin + y * cos), dim=-1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rotation))
    return turned.flatten(-2).to(x_NHK.dtype)
