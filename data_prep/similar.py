"""Near duplicates: clips that look alike by their perceptual hashes, found without comparing each with each.

Two clips are alike if their hashes differ in at most BITS of 192 bits and they are about as long. Of 12 bands of 16
bits, one then differs in a single bit or none (the pigeonhole principle), so only clips that share a band, or a band
but for one bit, are compared: multi-index hashing, Norouzi et al., 2012. A band that very many share (a plain picture)
tells nothing and is passed over, which bounds the work of each clip.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain

import numpy as np

BANDS, WIDTH = 12, 16
BITS = 2 * BANDS - 1  # of 192: recompressed, rescaled and brightened copies differ by less, other clips by about 96
FLIPS = np.array([0, *(1 << bit for bit in range(WIDTH))], dtype=np.uint16)
CROWD = 256  # representatives that share a band before it is passed over
LONGER = 0.05  # share by which the durations of two copies may differ


def duplicates(clips: Sequence[tuple[str, str, float]]) -> dict[str, str]:
    """Return which clips are near duplicates, each with the first of its like.

    Args:
        clips: (key, hash of 48 hex digits, seconds), in the order in which the first is to be kept.
    """
    hashes = np.frombuffer(bytes.fromhex("".join(text for _, text, _ in clips)), dtype=">u2").astype(np.uint16)
    hashes = hashes.reshape(-1, BANDS)
    seconds = np.array([length for _, _, length in clips])
    offsets = np.arange(BANDS, dtype=np.int64)[:, None] << WIDTH
    bands: dict[int, list[int]] = defaultdict(list)
    nothing: list[int] = []
    found: dict[str, str] = {}
    for number, (key, _, length) in enumerate(clips):
        looked = (offsets + (hashes[number][:, None] ^ FLIPS)).ravel().tolist()
        lists = (bands.get(name, nothing) for name in looked)
        near = np.fromiter(chain.from_iterable(item for item in lists if len(item) < CROWD), dtype=np.int64)
        differ = np.bitwise_count(hashes[near] ^ hashes[number]).sum(1)
        close = np.abs(seconds[near] - length) <= LONGER * np.maximum(seconds[near], length)
        alike = near[(differ <= BITS) & close]
        if len(alike):
            found[key] = clips[int(alike.min())][0]
            continue
        for name in looked[:: len(FLIPS)]:
            if len(bands[name]) < CROWD:
                bands[name].append(number)
    return found
