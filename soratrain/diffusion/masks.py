"""Which tokens of a clip are given when it is to be painted in: boxes, borders, stretches of time. Pure functions.

The masks are of tokens, for cached and for live latents alike, so that both train the same. A known token's latent has
seen pixels around it, unknown ones too, as far as the encoder's receptive field reaches. Sampling matches that where it
erodes what it is given by that field: what then is known is what encoding the true clip would give, as in training.

Legend: t y x tokens of a clip along time, rows and columns; spans are cut out of an axis by two numbers in [0, 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NUMBERS = 8  # that a mask takes
KINDS = ("box", "border", "stretch", "event")
HOLE = (0.25, 0.75)  # of an axis: what is to be painted, from a detail to most of the picture
WINDOW = (0.4, 0.9)  # of an axis: what is given where the borders are to be painted


def known_tokens(numbers: Tensor, grid: tuple[int, int, int]) -> Tensor | None:
    """Return which tokens are given, bool `[n]`; None where the clip is too small for any kind.

    A `box` of the picture is unknown throughout; or all around one, the `border`; or a `stretch` of time, all of the
    picture; or an `event`, a box for a stretch of time.

    Args:
        numbers: in [0, 1), `[NUMBERS]`, which decide all.
        grid: tokens along t, y and x.
    """
    kind_number, *rest = numbers.tolist()
    time, rows, columns = grid
    spatial = ["box", "border"] if rows * columns > 1 else []
    kinds = spatial + (["stretch"] if time > 1 else []) + (["event"] if time > 1 and spatial else [])
    if not kinds:
        return None
    kind = kinds[int(kind_number * len(kinds))]
    window = WINDOW if kind == "border" else HOLE
    inside = torch.zeros(grid, dtype=torch.bool)
    whole = slice(None)
    places = [span(rest[2 * axis : 2 * axis + 2], size, window) for axis, size in enumerate(grid)]
    inside[
        places[0] if kind in ("stretch", "event") else whole,
        places[1] if kind != "stretch" else whole,
        places[2] if kind != "stretch" else whole,
    ] = True
    return (inside if kind == "border" else ~inside).flatten()


def span(numbers: Sequence[float], size: int, shares: tuple[float, float]) -> slice:
    """Return a part of an axis of `size` tokens whose share of it lies in `shares`; all of an axis of one."""
    low, high = shares
    length = min(max(1, round(size * (low + (high - low) * numbers[0]))), max(1, size - 1))
    start = int(numbers[1] * (size - length + 1))
    return slice(start, start + length)
