"""The small world of `make demo`: one large object on a plain background, in one of six motions."""

from __future__ import annotations

from itertools import product

import numpy as np

from data_prep.world.motion import place_of
from data_prep.world.scene import Scene, Sprite
from data_prep.world.seen import BACKGROUNDS, COLORS, DIRECTIONS, VOCABULARIES, Seen, Thing
from data_prep.world.shapes import EXTENTS

WORDS = VOCABULARIES["demo"]
FPS = 8.0
SIZES = ((48, 48), (48, 64), (64, 48))  # height, width; small, so that two CPU cores see many clips in minutes
SIZE_SHARES = (0.6, 0.2, 0.2)
FRAMES = (9, 17, 1)  # the first is what prompts ask for
FRAME_SHARES = (0.70, 0.10, 0.20)
RADII = {"small": (0.20, 0.215), "large": (0.245, 0.26)}  # of the shorter side
TRAVEL = {17: (0.36, 0.46), 9: (0.36, 0.46)}  # of the side that it moves along
FALL_FRAMES = 4.0  # a bouncing object takes half a second down and half a second up
MARGIN = 1.0  # pixels between an object and the frame's edge, at least

Combination = tuple[str, str, str]  # color, shape, motion


def is_held(combination: Combination) -> bool:
    """Whether a combination is kept out of training.

    One of every six is, so spread that each pair of values still occurs in training: with whole pairs held out, colour
    and motion would betray the shape, and a net could name shapes without looking at them.
    """
    color, shape, motion = combination
    place = WORDS.colors.index(color) + 2 * WORDS.shapes.index(shape) + WORDS.motions.index(motion)
    return place % 6 == 0


def combinations(*, held: bool, still: bool = False) -> list[Combination]:
    """Return all combinations of one kind; images are judged as clips in which nothing moves."""
    every = product(WORDS.colors, WORDS.shapes, ("still",) if still else WORDS.motions)
    return [combination for combination in every if is_held(combination) == held]


def chance() -> dict[str, float]:
    """Return how often a guess is right, by attribute."""
    return {
        "color": 1 / len(WORDS.colors),
        "shape": 1 / len(WORDS.shapes),
        "motion": 1 / len(WORDS.motions),
        "background": 1 / len(BACKGROUNDS),
    }


def sample(rng: np.random.Generator, combination: Combination, height: int, width: int, frames: int) -> Scene:
    """Return a scene of a combination: its place, size, background and words are drawn from `rng`."""
    color, shape, motion = combination
    background = str(rng.choice(list(BACKGROUNDS)))
    size = str(rng.choice(list(RADII)))
    radius = float(rng.uniform(*RADII[size])) * min(height, width)
    left, right, up, down = (extent * radius + MARGIN for extent in EXTENTS[shape])
    path = travel(rng, motion, (left, width - right), (up, height - down), (width, height), frames)
    thing = Thing(
        color,
        shape,
        motion if frames > 1 else None,
        size=size,
        texture="plain",
        place=place_of(path[0], height, width),
        lasts=True,
    )
    return Scene(
        height=height,
        width=width,
        frames=frames,
        fps=FPS,
        background=BACKGROUNDS[background],
        sprites=(Sprite(shape, COLORS[color], radius, path),),
        truth=Seen(background, (thing,), camera="still" if frames > 1 else None, pattern="plain"),
        wording=int(rng.integers(1 << 16)),
    )


def travel(
    rng: np.random.Generator,
    motion: str,
    free_x: tuple[float, float],
    free_y: tuple[float, float],
    size: tuple[int, int],
    frames: int,
) -> np.ndarray:
    """Return the centroid's path `[T, 2]` of a motion that stays within the free ranges."""
    time = np.arange(frames, dtype=np.float64)
    path = np.empty((frames, 2))
    free = (free_x, free_y)
    for axis in (0, 1):
        path[:, axis] = rng.uniform(*free[axis])
    if motion == "bounces":
        floor, ceiling = free_y[1], free_y[0]
        height = min(float(rng.uniform(0.36, 0.46)) * size[1], floor - ceiling)
        phase = (time / FALL_FRAMES + 1) % 2 - 1
        path[:, 1] = floor - height * (1 - phase**2)
    elif motion != "still":
        axis, sign = DIRECTIONS[motion]
        low, high = free[axis]
        way = min(float(rng.uniform(*TRAVEL.get(frames, TRAVEL[17]))) * size[axis], high - low)
        start = float(rng.uniform(low, max(high - way, low)))
        along = time / max(frames - 1, 1)
        path[:, axis] = start + way * (along if sign > 0 else 1 - along)
    return path
