"""In which order a bucket's samples are shown: each pass shows all of them, shuffled so that storage is read in runs.

    pass     every sample of the bucket once; the shards are permuted anew, alike for all buckets
    window   so many shards, one after another in the pass; all of their samples are shown before the next window's
    run      a slot's samples of a window: neighbours in the shards, shuffled

Slots are the canonical ranks. Buckets go through the shards together, and each is cut into runs at the same places, so
what a rank reads at a time is one stretch of the shards, whatever the buckets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from soratrain.batch import draw_of
from soratrain.data.assignment import Assignment
from soratrain.data.manifest import Manifest

_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Steele et al., 2014
REMEMBERED = 64  # passes whose permutation of the shards is kept


def permutation(count: int, *key: object) -> np.ndarray:
    """Return a permutation of `count` numbers that depends on `key` alone, not on a library's version, [count] int64.

    It sorts the numbers by a hash of (key, number), SplitMix64.
    """
    with np.errstate(over="ignore"):
        numbers = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_SPLITMIX[0]) + np.uint64(draw_of(*key))
    return np.argsort(mixed(numbers), kind="stable")


def mixed(numbers: np.ndarray) -> np.ndarray:
    """Return a hash of each number, uint64, which gives no two of them the same."""
    with np.errstate(over="ignore"):
        for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2])):
            numbers = (numbers ^ (numbers >> np.uint64(shift))) * np.uint64(factor)
        return numbers ^ (numbers >> np.uint64(31))


@dataclass(frozen=True)
class _Pass:
    """One pass over a bucket: its shards in the pass's order, as [first, stop) among its members, and their windows."""

    number: int
    first: np.ndarray
    stop: np.ndarray
    window: np.ndarray
    ends: np.ndarray  # samples up to and with each shard


@dataclass(frozen=True)
class _Window:
    """The samples of one window of a pass, which stand at places `first` and on in the pass."""

    number: int
    first: int
    samples: np.ndarray


class Streams:
    """One endless stream of samples a bucket.

    Args:
        assignment: the buckets; their samples are numbered as they lie in the shards.
        manifest: the shards.
        sizes: samples that a slot takes of each bucket at a time; slots take turns.
        slots: canonical ranks, or 1 where slots do not take turns.
        seed: of the order.
        window: shards.
    """

    def __init__(
        self,
        *,
        assignment: Assignment,
        manifest: Manifest,
        sizes: Sequence[int],
        slots: int,
        seed: int,
        window: int,
    ) -> None:
        self.assignment, self.manifest, self.names = assignment, manifest, assignment.names
        self.sizes, self.slots, self.seed, self.window = sizes, slots, seed, window
        self._places: dict[int, np.ndarray] = {}
        self._passes: dict[int, _Pass] = {}
        self._windows: dict[int, _Window] = {}

    def take(self, bucket: int, first: int, count: int) -> np.ndarray:
        """Return samples `first` to `first + count` of a bucket's stream, [count] int64."""
        parts = []
        while count:
            turn, place = divmod(first, len(self.assignment.members[bucket]))
            window = self._window(bucket, turn, place)
            part = window.samples[place - window.first : place - window.first + count]
            parts.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(parts)

    def _window(self, bucket: int, turn: int, place: int) -> _Window:
        """Return the window that holds `place` of pass `turn`."""
        known = self._passes.get(bucket)
        if known is None or known.number != turn:
            known = self._passes[bucket] = self._pass(bucket, turn)
            self._windows.pop(bucket, None)
        window = self._windows.get(bucket)
        if window is None or not 0 <= place - window.first < len(window.samples):
            number = int(known.window[np.searchsorted(known.ends, place, side="right")])
            window = self._windows[bucket] = self._shuffled(bucket, known, number)
        return window

    def _pass(self, bucket: int, turn: int) -> _Pass:
        lies_in, first = np.unique(self.manifest.shard[self.assignment.members[bucket]], return_index=True)
        stop = np.append(first[1:], len(self.assignment.members[bucket]))
        places = self._shard_places(turn)[lies_in]
        order = np.argsort(places)
        first, stop = first[order], stop[order]
        return _Pass(turn, first, stop, places[order] // self.window, np.cumsum(stop - first))

    def _shard_places(self, turn: int) -> np.ndarray:
        """Return where each shard stands in pass `turn` of any bucket."""
        if turn not in self._places:
            if len(self._places) == REMEMBERED:
                self._places.clear()
            count = len(self.manifest.shards)
            places = np.empty(count, dtype=np.int64)
            places[permutation(count, self.seed, "shards", turn)] = np.arange(count)
            self._places[turn] = places
        return self._places[turn]

    def _shuffled(self, bucket: int, known: _Pass, number: int) -> _Window:
        """Give each slot a run of the window's samples, and shuffle it over the places at which it is the slot's turn.

        The window is cut where the slots' counts of places say, so each place gets one sample and none is left.
        """
        low, high = np.searchsorted(known.window, (number, number + 1))
        chosen = [np.arange(a, b) for a, b in zip(known.first[low:high], known.stop[low:high], strict=True)]
        samples = self.assignment.members[bucket][np.concatenate(chosen)]
        start = int(known.ends[low - 1]) if low else 0
        begin = known.number * len(self.assignment.members[bucket]) + start
        slot = (np.arange(begin, begin + len(samples)) // self.sizes[bucket]) % self.slots
        mixed = permutation(len(samples), self.seed, "order", *self.names[bucket], known.number, number)
        shuffled = np.empty_like(samples)
        shuffled[mixed[np.argsort(slot[mixed], kind="stable")]] = samples
        return _Window(number, start, shuffled)
