"""The objects of the full world's stories, and which combinations are held out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.world.motion import Range
from data_prep.world.scene import Sprite
from data_prep.world.seen import COLORS, TWO_PARTS, VOCABULARIES
from data_prep.world.shapes import EXTENTS

WORDS = VOCABULARIES["full"]
RADII = {"small": (0.125, 0.145), "large": (0.175, 0.20)}  # of the shorter side
MARGIN = 1.0  # pixels between an object and the frame's edge, at least

# Every color and every simple motion is held out with one shape; motions in two parts are not.
HELD_PAIRS = {(color, WORDS.shapes[(2 * index + 1) % 5]) for index, color in enumerate(WORDS.colors)}
HELD_MOTIONS = {
    (WORDS.shapes[2 * index % 5], motion) for index, motion in enumerate(m for m in WORDS.motions if m not in TWO_PARTS)
}


def is_held(color: str, shape: str, motion: str | None) -> bool:
    """Whether an object with these attributes is kept out of training."""
    return (color, shape) in HELD_PAIRS or (shape, motion) in HELD_MOTIONS


@dataclass
class Player:
    """An object of a story: what it is, and its path."""

    color: str
    shape: str
    motion: str | None
    size: str
    radius: float
    texture: str
    path: np.ndarray
    pieces: tuple[Sprite, ...] = ()

    def extents(self) -> tuple[float, float, float, float]:
        """Its extents left, right, up and down in pixels, with the margin."""
        left, right, up, down = (extent * self.radius + MARGIN for extent in EXTENTS[self.shape])
        return left, right, up, down

    def free(self, height: int, width: int) -> tuple[Range, Range]:
        """The ranges of x and y in which it lies wholly inside a frame."""
        left, right, up, down = self.extents()
        return (left, width - right), (up, height - down)

    def sprites(self) -> tuple[Sprite, ...]:
        """What is drawn of it, from back to front."""
        return self.pieces or (Sprite(self.shape, COLORS[self.color], self.radius, self.path, self.texture),)
