"""A scene: all that is needed to draw a clip, and the truth about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.world.seen import Seen

Color = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class Sprite:
    """One thing that is drawn.

    Attributes:
        shape: a name that `draw.coverage` knows.
        color: RGB, 0 to 255.
        radius: size in pixels; a circle's radius, other shapes have about a circle's area.
        path: float64 `[T, 2]`, (x, y) of its centroid in pixels; pixel (0, 0) has its centre at (0.5, 0.5).
    """

    shape: str
    color: Color
    radius: float
    path: np.ndarray


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip before it is drawn.

    Attributes:
        sprites: from back to front.
        truth: what is to be seen in it.
        wording: which of the paraphrases its captions use.
    """

    height: int
    width: int
    frames: int
    fps: float
    background: Color
    sprites: tuple[Sprite, ...]
    truth: Seen
    wording: int
