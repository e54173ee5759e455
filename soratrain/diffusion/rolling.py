"""Clips of any length by windows: each sees the last (or first) latents of what is there, so none is ever larger.

`draw(layout, name)` returns the drawn stretch `[C, t, h, w]` of a layout; `name` tells the windows' noise apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from soratrain.diffusion.ways import Layout, following, leading

Draw = Callable[[Layout, str], Tensor]


def noise_of(number: int) -> str:
    """Return the name of a window's noise."""
    return f"window {number}" if number else "noise"


def forwards(
    draw: Draw, tail: Tensor, steps: int, fps: float, *, window: int, context: int, standalone: bool
) -> Iterator[Tensor]:
    """Yield `steps` latents that follow `tail` `[C, p, h, w]`, a window at a time.

    Args:
        window: most latent frames of a window, those given counted in.
        context: how many of what is there each window sees, at most.
        standalone: whether `tail` begins where its clip does.
    """
    number = 0
    while steps:
        drawn = draw(following(tail, min(steps, window - tail.shape[1]), fps, standalone=standalone), noise_of(number))
        yield drawn
        steps, number = steps - drawn.shape[1], number + 1
        standalone = standalone and tail.shape[1] + drawn.shape[1] <= context
        tail = torch.cat((tail, drawn), dim=1)[:, -context:]


def backwards(draw: Draw, head: Tensor, steps: int, fps: float, *, window: int, context: int) -> Iterator[Tensor]:
    """Yield what comes before `head` `[C, m, h, w]`, encoded standalone, a window at a time, the latest first.

    Each window is a clip of its own: its first latent has nothing before it, so the next one takes its first latents as
    they are, and its last frame is the first of what follows it. Of `n` latents, 4 (n - 1) frames are new; those of
    all windows are 4 `steps`.

    Args:
        window: most latent frames of a clip as long as a window, which holds one more here: both parts show one frame.
        context: how many of what is there each window sees, at most.
    """
    number = 0
    while steps:
        drawn = draw(leading(head, min(steps, window - head.shape[1]), fps), noise_of(number))
        yield drawn
        steps, number = steps - (drawn.shape[1] - 1), number + 1
        head = drawn[:, :context]
