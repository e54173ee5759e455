"""Paths of objects, straight, turning, falling, bouncing, breaking: centroids `[T, 2]`, (x, y) in pixels."""

from __future__ import annotations

import numpy as np

from data_prep.world.seen import DIRECTIONS

GRAVITY = 4.0  # shorter sides of the frame per second squared, the same in every scene
PIECES = 3
PIECE_RADIUS = 0.55  # of the object that broke; the pieces have about its area
PIECE_GAP = 1.9  # distance between pieces at the end, in radii of the object that broke
SCATTER_SECONDS = 0.15  # how soon the pieces come to rest

Range = tuple[float, float]


def two_parts(
    rng: np.random.Generator, parts: tuple[str, str], free: tuple[Range, Range], ways: tuple[float, float], frames: int
) -> np.ndarray:
    """Return a path of two straight parts of equal time that stays in the free ranges.

    Args:
        parts: "still" or a direction, each.
        free: ranges of x and y, in pixels.
        ways: length of a part along x and along y, in pixels.
    """
    half = (frames - 1) / 2
    time = np.arange(frames) / half
    moves = np.zeros((2, 2))
    for number, part in enumerate(parts):
        if part != "still":
            axis, sign = DIRECTIONS[part]
            moves[number, axis] = sign * min(ways[axis], free[axis][1] - free[axis][0])
    path = np.clip(time, 0, 1)[:, None] * moves[0] + np.clip(time - 1, 0, 1)[:, None] * moves[1]
    returns = not moves.sum(0).any() and moves.any()
    for axis in (0, 1):
        low = free[axis][0] - path[:, axis].min()
        high = max(low, free[axis][1] - path[:, axis].max())
        start = float(rng.uniform(low, high))
        if returns and moves[0, axis]:  # it comes back from the frame's edge
            start = high if moves[0, axis] > 0 else low
        path[:, axis] += start
    return path


def fall_seconds(height: float, side: float) -> float:
    """Return how long a fall takes from rest over `height` pixels in a frame whose shorter side is `side`."""
    return float(np.sqrt(2 * height / (GRAVITY * side)))


def falling(time: np.ndarray, top: float, floor: float, side: float) -> np.ndarray:
    """Return y of a fall from rest that ends on the floor."""
    return np.minimum(top + GRAVITY * side * time**2 / 2, floor)


def bouncing(time: np.ndarray, top: float, floor: float, side: float) -> np.ndarray:
    """Return y of a fall from rest with elastic rebounds from the floor."""
    phase = (time / fall_seconds(floor - top, side) + 1) % 2 - 1
    return floor - (floor - top) * (1 - phase**2)


def scattering(
    time: np.ndarray, point: tuple[float, float], floor: float, radius: float, side: float
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the path and the angles of every piece of an object that breaks at time 0.

    Args:
        time: seconds since the impact, `[T]`; negative ones give the place of the impact.
        point: where the object's centroid is at the impact.
        floor: y on which the pieces come to rest.
        radius: of the object.
    """
    since = np.maximum(time, 0)
    slide = 1 - np.exp(-since / SCATTER_SECONDS)
    pieces = []
    for number in range(PIECES):
        way = (number - (PIECES - 1) / 2) * PIECE_GAP * radius
        hop = GRAVITY * side * since * np.maximum(0.3 - since, 0) / 2
        y = point[1] + (floor - point[1]) * slide - hop
        angle = (number + 1) * 2.1 + 2.5 * slide * (-1) ** number
        pieces.append((np.stack([point[0] + way * slide, np.minimum(y, floor)], 1), angle))
    return pieces


def place_of(point: np.ndarray, height: int, width: int) -> tuple[str, str]:
    """Return the third of the frame, as (row, column), in which a point lies."""
    row = ("top", "middle", "bottom")[min(max(int(3 * point[1] / height), 0), 2)]
    column = ("left", "middle", "right")[min(max(int(3 * point[0] / width), 0), 2)]
    return row, column
