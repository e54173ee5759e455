"""Interleaving blocks of different buckets so that each comes as often as it should, at every scale.

Block k of bucket b stands at time (k + phase_b) · span_b / rate_b, where span is the samples of a block and rate the
samples of an epoch; the order of blocks is the order of these times, worked out in exact integers. So block n is found
without walking through the n before it, and in any stretch of the run each bucket has its share to within a block.
"""

from __future__ import annotations

from collections.abc import Sequence

CHUNK = 1024  # blocks worked out at a time
PHASE, CLOCK, RATE = 16, 40, 16  # fractional bits of phases, of times, of rates


class Schedule:
    """An endless sequence of (bucket, turn), where turn counts the bucket's blocks.

    Args:
        spans: samples of a block, by bucket.
        rates: samples of an epoch, by bucket.
        phases: any integers, of which the low bits shift a bucket against the others.
    """

    def __init__(self, *, spans: Sequence[int], rates: Sequence[float], phases: Sequence[int]) -> None:
        self.spans = [span << CLOCK for span in spans]
        self.rates = [max(1, round(rate * (1 << RATE))) for rate in rates]
        self.phases = [phase & ((1 << PHASE) - 1) for phase in phases]
        self._chunk: tuple[int, list[tuple[int, int]]] = (-1, [])

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Return the bucket of block `number`, and how many blocks of that bucket came before it."""
        chunk, place = divmod(number, CHUNK)
        if self._chunk[0] != chunk:
            self._chunk = chunk, self._work_out(chunk)
        return self._chunk[1][place]

    def _counts(self, time: int) -> list[int]:
        """Return how many blocks of each bucket stand before `time`."""
        return [
            max(0, (((time * rate - 1) // span - phase) >> PHASE) + 1)
            for span, rate, phase in zip(self.spans, self.rates, self.phases, strict=True)
        ]

    def before(self, time: int, units: Sequence[int]) -> int:
        """Return the sum of the units of all blocks that stand before `time`; `units` is by bucket."""
        return sum(count * unit for count, unit in zip(self._counts(time), units, strict=True))

    def latest(self, amount: int, units: Sequence[int]) -> int:
        """Return the latest time before which blocks of at most `amount` units stand."""
        high = 1
        while self.before(high, units) <= amount:
            high *= 2
        low = high // 2
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.before(middle, units) <= amount else (low, middle)
        return low

    def between(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return the blocks that stand at times from `start` to before `end`, in order; equal times by bucket."""
        events = []
        for bucket, (first, last) in enumerate(zip(self._counts(start), self._counts(end), strict=True)):
            span, rate, phase = self.spans[bucket], self.rates[bucket], self.phases[bucket]
            events += [(((turn << PHASE) + phase) * span // rate, bucket, turn) for turn in range(first, last)]
        return [(bucket, turn) for _, bucket, turn in sorted(events)]

    def _work_out(self, chunk: int) -> list[tuple[int, int]]:
        each = [1] * len(self.spans)
        start, end = self.latest(chunk * CHUNK, each), self.latest((chunk + 1) * CHUNK, each) + 1
        skip = chunk * CHUNK - self.before(start, each)
        return self.between(start, end)[skip : skip + CHUNK]
