"""Name the motion of a centroid, and find what the camera does."""

from __future__ import annotations

import numpy as np

from data_prep.world.seen import Vocabulary

STILL = 0.10  # of the shorter side: what moves less stands still
DIAGONAL = 1.5  # a way whose longer component is less than so much longer than the other has no name
BEND = 0.15  # a path is in two parts if these leave less than this share of a single line's squared error
CURVE = 0.06  # a path along a straight line deviates from constant speed by less than this share of its length
SEARCH = 4  # pixels that a background moves from frame to frame, at most


def read_motion(path: np.ndarray, times: np.ndarray, unit: float, words: Vocabulary) -> str | None:
    """Return the name of a trajectory; None where it is none of ours.

    Args:
        path: `[N, 2]`, (x, y) relative to the ground.
        times: `[N]`, the frames at which it was seen, rising.
        unit: the shorter side of the frame.
    """
    if len(path) < 2:
        return None
    y = path[:, 1]
    fall = y - np.minimum.accumulate(y)
    rise = y - np.minimum.accumulate(y[::-1])[::-1]
    level = np.ptp(path[:, 0]) < max(STILL * unit, 0.5 * np.ptp(y))
    if level and np.minimum(fall, rise).max() > STILL * unit:
        return "bounces"
    whole = direction(path[-1] - path[0], unit)
    bends = bend(path, times, unit) if any("," in motion for motion in words.motions) else None
    if bends:
        first, second = bends
        if {first, second} == {"still", "down"}:
            return "falls"
        return f"{first}, {second}" if f"{first}, {second}" in words.motions else whole
    if whole == "down" and "falls" in words.motions:
        line = np.polyval(np.polyfit(times, y, 1), times)
        if np.abs(y - line).max() > CURVE * np.ptp(y):
            return "falls"
    return whole


def direction(way: np.ndarray, unit: float) -> str | None:
    """Return the name of a way (x, y): "still", a direction, or None for a diagonal."""
    x, y = np.abs(way)
    if max(x, y) < STILL * unit:
        return "still"
    if max(x, y) < DIAGONAL * min(x, y):
        return None
    if x > y:
        return "right" if way[0] > 0 else "left"
    return "down" if way[1] > 0 else "up"


def bend(path: np.ndarray, times: np.ndarray, unit: float) -> tuple[str, str] | None:
    """Return the names of the two straight parts of a path; None where it is one, or not straight."""
    if len(path) < 6:
        return None
    ones = np.ones(len(times))
    single = squared_error(np.stack([ones, times], 1), path)
    best, at = np.inf, 0.0
    for middle in np.arange(times[2], times[-3] + 0.25, 0.5):
        design = np.stack([ones, times, np.maximum(times - middle, 0)], 1)
        error = squared_error(design, path)
        if error < best:
            best, at = error, float(middle)
    if best > BEND * single or single < len(path) * (0.02 * unit) ** 2:
        return None
    fit = np.linalg.lstsq(np.stack([ones, times, np.maximum(times - at, 0)], 1), path, rcond=None)[0]
    speeds = fit[1], fit[1] + fit[2]
    first = direction(speeds[0] * (at - times[0]), unit)
    second = direction(speeds[1] * (times[-1] - at), unit)
    return (first, second) if first and second and first != second else None


def squared_error(design: np.ndarray, path: np.ndarray) -> float:
    """Return the squared error that a least-squares fit leaves."""
    fit = np.linalg.lstsq(design, path, rcond=None)[0]
    return float(((path - design @ fit) ** 2).sum())


def background_shift(clip: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Return how far the background has moved since the first frame, `[T, 2]` (x, y) in pixels.

    Args:
        clip: brightness, float `[T, H, W]`.
        free: bool `[T, H, W]`, where the background is to be seen.
    """
    shift = np.zeros((len(clip), 2))
    if min(clip.shape[1:]) <= 2 * SEARCH:
        return shift
    for index in range(1, len(clip)):
        shift[index] = shift[index - 1] + match(clip[index - 1], clip[index], free[index - 1], free[index])
    return shift


def match(before: np.ndarray, after: np.ndarray, free: np.ndarray, free_after: np.ndarray) -> np.ndarray:
    """Return the shift (x, y) that best takes one picture to the next, to a fraction of a pixel."""
    height, width = before.shape
    reach = np.arange(-SEARCH, SEARCH + 1)
    inner = (slice(SEARCH, height - SEARCH), slice(SEARCH, width - SEARCH))
    cost = np.empty((len(reach), len(reach)))
    for i, y in enumerate(reach):
        for j, x in enumerate(reach):
            there = (slice(SEARCH + y, height - SEARCH + y), slice(SEARCH + x, width - SEARCH + x))
            both = free[inner] & free_after[there]
            gap = (after[there] - before[inner])[both]
            cost[i, j] = (gap @ gap) / max(gap.size, 1) + 1e-3 * (x * x + y * y)  # without a pattern, no shift
    row, column = divmod(int(cost.argmin()), len(reach))
    return np.array([reach[column] + vertex(cost[row], column), reach[row] + vertex(cost[:, column], row)])


def vertex(cost: np.ndarray, index: int) -> float:
    """Return where between its neighbours the parabola through a minimum has its vertex, -0.5 to 0.5."""
    if not 0 < index < len(cost) - 1:
        return 0.0
    low, middle, high = cost[index - 1 : index + 2]
    curve = low - 2 * middle + high
    return float(np.clip((low - high) / (2 * curve), -0.5, 0.5)) if curve > 1e-2 else 0.0
