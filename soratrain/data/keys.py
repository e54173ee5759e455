"""Sample keys (`S32`) by the million: a hash that sorts quickly, and finding those that occur twice."""

from __future__ import annotations

import numpy as np

WIDTH = 32  # bytes
_FACTOR = np.uint64(0x9E3779B97F4A7C15)


def hashed(keys: np.ndarray) -> np.ndarray:
    """Return a hash of each key [N] `S32`, [N] uint64; different keys may share one."""
    words = np.ascontiguousarray(keys, dtype=f"S{WIDTH}").view("<u8").reshape(-1, WIDTH // 8)
    found = np.zeros(len(words), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for column in range(words.shape[1]):
            found = (found ^ words[:, column]) * _FACTOR
            found ^= found >> np.uint64(29)
    return found


def repeated(keys: np.ndarray) -> str | None:
    """Return a key that occurs more than once in `keys` [N] `S32`, or None."""
    hashes = hashed(keys)
    ordered = np.sort(hashes)
    met = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(met):
        return None
    names, counts = np.unique(keys[np.isin(hashes, met)], return_counts=True)
    return bytes(names[counts.argmax()]).decode() if counts.max() > 1 else None
