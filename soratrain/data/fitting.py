"""Finding the bucket that a size fits into, and merging buckets that hold too few samples."""

from __future__ import annotations

import math

import numpy as np

GRID = 16  # pixels: VAE stride 8 × patch 2
TIME = 4  # frames: the VAE's stride; a clip has 1 + 4k
PART = 1 << 18  # rows that are sorted at a time, so that they stay in a core's cache
SAME_ASPECT = 0.1  # ratios within 10 % count as equal: rounding to GRID moves them by about as much


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct rows of [N, K] small non-negative integers, which one each row is [N], and how often each.

    It sorts packed integers, a hundred times as fast as sorting rows, a part at a time: few differ among millions.
    """
    bits = 63 // rows.shape[1]
    assert not len(rows) or (rows.min() >= 0 and rows.max() < 1 << bits), "sizes and durations are below 2 million"
    packed = np.zeros(len(rows), dtype=np.int64)
    for column in range(rows.shape[1]):
        packed = (packed << bits) | rows[:, column].astype(np.int64)
    parts = [slice(start, start + PART) for start in range(0, len(packed), PART)]
    found = np.unique(np.concatenate([np.unique(packed[part]) for part in parts] or [packed]))
    which = np.empty(len(packed), dtype=np.int64)
    for part in parts:
        which[part] = np.searchsorted(found, packed[part])
    shifts = bits * np.arange(rows.shape[1])[::-1]
    unpacked = (found[:, None] >> shifts & ((1 << bits) - 1)).astype(rows.dtype)
    return unpacked, which, np.bincount(which, minlength=len(found))


def on_grid(height: np.ndarray, width: np.ndarray, area: int | None, grid: int = GRID) -> tuple[np.ndarray, np.ndarray]:
    """Return the bucket's height and width for frames of the given sizes [G], scaled down to `area` where larger.

    Of the grid's sizes around the exact one, none above the source or `area`, it takes the nearest aspect ratio, then
    the largest. A very flat frame keeps one row of the grid.
    """
    limit = np.asarray(np.maximum(height * width, 1) if area is None else area)
    scale = np.minimum(1.0, np.sqrt(limit / np.maximum(height * width, 1)))
    rows, columns = (np.floor(side * scale / grid + 1e-6).astype(np.int64) * grid for side in (height, width))
    flat = limit // grid // grid * grid
    options = [(rows + up, columns + right) for up in (0, grid) for right in (0, grid)]
    options += [
        (np.full_like(rows, grid), np.minimum(columns, flat)),
        (np.minimum(rows, flat), np.full_like(rows, grid)),
    ]
    best = np.zeros((2, len(height)), dtype=np.int64)
    best_score = np.full(len(height), -math.inf)
    aspect = np.log(np.maximum(width, 1) / np.maximum(height, 1))
    for high, wide in options:
        fits = (high >= grid) & (wide >= grid) & (high <= height) & (wide <= width) & (high * wide <= limit)
        steps = np.floor(np.abs(aspect - np.log(np.maximum(wide, 1) / np.maximum(high, 1))) / SAME_ASPECT)
        score = np.where(fits, np.log(np.maximum(high * wide, 1)) - 100.0 * steps, -math.inf)
        better = score > best_score
        best[0, better], best[1, better], best_score[better] = high[better], wide[better], score[better]
    return best[0], best[1]


def nearest(sources: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the row of `table` [B, 3] that fits best inside each (h, w, frames) of `sources` [G, 3], or -1, [G].

    The nearest aspect ratio comes first, then the largest volume. Rows of one frame take sources that are too short to
    be a clip (fewer than 1 + TIME frames), and only those.
    """
    best = np.full(len(sources), -1, dtype=np.int64)
    best_score = np.full(len(sources), -math.inf)
    aspect = np.log(np.maximum(sources[:, 1], 1) / np.maximum(sources[:, 0], 1))
    still = sources[:, 2] < 1 + TIME
    for number, row in enumerate(table):
        fits = (sources >= row).all(1) & (still == (row[2] == 1))
        steps = np.floor(np.abs(aspect - math.log(row[1] / row[0])) / SAME_ASPECT)
        score = np.where(fits, math.log(row.prod()) - 100.0 * steps, -math.inf)
        better = score > best_score
        best[better], best_score[better] = number, score[better]
    return best


def merge_rare(
    cells: np.ndarray, counts: np.ndarray, need: np.ndarray
) -> tuple[np.ndarray, list[tuple[int, int, int]], np.ndarray]:
    """Merge cells [B, 3] that hold fewer samples than they need, rarest first, the larger of equals first.

    Returns:
        The cell in which each ends, [B]; the merges as (from, to, samples); how many samples each then holds, [B].
    """
    counts, volume = counts.copy(), cells.prod(1)
    parent = np.arange(len(cells))
    alive, stuck = np.ones(len(cells), dtype=bool), np.zeros(len(cells), dtype=bool)
    merged = []
    while (rare := np.flatnonzero(alive & ~stuck & (counts < need))).size:
        cell = rare[np.lexsort((-volume[rare], counts[rare]))[0]]
        others = np.flatnonzero(alive & (np.arange(len(cells)) != cell))
        found = nearest(cells[[cell]], cells[others])[0] if others.size else -1
        if found < 0:
            stuck[cell] = True
            continue
        target = others[found]
        merged.append((int(cell), int(target), int(counts[cell])))
        counts[target] += counts[cell]
        alive[cell], parent[parent == cell] = False, target
    return parent, merged, np.where(alive, counts, 0)
