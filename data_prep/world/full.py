"""The whole world: scenes of many sizes, lengths and rates, with gravity, collisions and a moving camera."""

from __future__ import annotations

import numpy as np

from data_prep.world.cast import WORDS
from data_prep.world.scene import Scene
from data_prep.world.seen import BACKGROUNDS, CAMERAS
from data_prep.world.stories import Director

SIZES = ((64, 64), (64, 96), (96, 64), (80, 80), (64, 112), (112, 64), (96, 96), (96, 128), (128, 96), (128, 128))
RATES = {9: (8,), 17: (8, 12, 16), 25: (12, 16, 24), 33: (16, 24)}  # frames a second by frames: 1 to 2 seconds
IMAGE_SHARE = 0.15


def chance() -> dict[str, float]:
    """Return how often a guess among all words of an attribute is right."""
    words = {"color": WORDS.colors, "shape": WORDS.shapes, "motion": WORDS.motions, "camera": CAMERAS}
    sizes = {name: len(values) for name, values in words.items()} | {"background": len(BACKGROUNDS), "number": 3}
    return {name: 1 / size for name, size in sizes.items()}


def sample(rng: np.random.Generator, *, held: bool, frames: int | None = None) -> Scene:
    """Return a scene; its size, length (unless given), rate, story and words are drawn from `rng`."""
    height, width = SIZES[rng.integers(len(SIZES))]
    image = rng.random() < IMAGE_SHARE
    drawn = 1 if image else int(rng.choice(list(RATES)))
    frames = drawn if frames is None else frames
    fps = float(rng.choice(RATES[frames])) if frames > 1 else 8.0
    return Director(rng, held=held, height=height, width=width, frames=frames, fps=fps).direct()
