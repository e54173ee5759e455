"""A scene: all that is needed to draw a clip, and the truth about it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.world.seen import Color, Seen


@dataclass(frozen=True, eq=False)
class Sprite:
    """One thing that is drawn.

    Attributes:
        shape: a name that `shapes.distance` knows.
        color: RGB, 0 to 255.
        radius: size in pixels; a circle's radius, other shapes have about a circle's area.
        path: float64 `[T, 2]`, (x, y) of its centroid in pixels; pixel (0, 0) has its centre at (0.5, 0.5).
        angle: clockwise turn in radians, `[T]`; None is upright.
        present: bool `[T]`, whether it is there; None is always.
    """

    shape: str
    color: Color
    radius: float
    path: np.ndarray
    texture: str = "plain"
    angle: np.ndarray | None = None
    present: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Scene:
    """A clip before it is drawn.

    Attributes:
        sprites: from back to front.
        truth: what is to be seen in it.
        wording: which of the paraphrases its captions use.
        view: float64 `[T, 3]`, the camera's offset (x, y) in pixels and its zoom; None is a camera at rest.
        behind: the caption's first object passes behind its second.
    """

    height: int
    width: int
    frames: int
    fps: float
    background: Color
    sprites: tuple[Sprite, ...]
    truth: Seen
    wording: int
    pattern: str = "plain"
    view: np.ndarray | None = None
    behind: bool = False

    def on_screen(self, path: np.ndarray) -> np.ndarray:
        """Return where in the picture a path `[T, 2]` of the world is seen."""
        if self.view is None:
            return path
        centre = np.array([self.width, self.height]) / 2
        return (path - centre - self.view[:, :2]) * self.view[:, 2:] + centre
