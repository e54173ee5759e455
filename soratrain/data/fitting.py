"""Finding the bucket that a size fits into, and merging buckets that hold too few samples."""

from __future__ import annotations

import math

import numpy as np

GRID = 16  # pixels: VAE stride 8 × patch 2
TIME = 4  # frames: the VAE's stride; a clip has 1 + 4k
SAME_ASPECT = 0.1  # ratios within 10 % count as equal: rounding to GRID moves them by about as much


def distinct(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct rows of [N, K] small non-negative integers, which one each row is [N], and how often each.

    It sorts packed integers, a hundred times as fast as sorting rows.
    """
    bits = 63 // rows.shape[1]
    assert not len(rows) or (rows.min() >= 0 and rows.max() < 1 << bits), "sizes and durations are below 2 million"
    packed = np.zeros(len(rows), dtype=np.int64)
    for column in range(rows.shape[1]):
        packed = (packed << bits) | rows[:, column].astype(np.int64)
    _, first, which, counts = np.unique(packed, return_index=True, return_inverse=True, return_counts=True)
    return rows[first], which, counts


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
) -> tuple[np.ndarray, list[tuple[int, int, int]], list[int]]:
    """Merge cells [B, 3] that hold fewer samples than they need, rarest first, the larger of equals first.

    Returns:
        The cell in which each ends, [B]; the merges as (from, to, samples); rare cells that nothing smaller can take.
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
    return parent, merged, np.flatnonzero(alive & (counts < need)).tolist()
