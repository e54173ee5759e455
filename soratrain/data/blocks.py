"""Blocks: what all slots compute at the same time, equally long.

A block is one micro-batch a slot. With `BucketBlocks` its samples are all of one bucket; with `PackBlocks` they are of
any, laid out so that each slot's cost about the same. Any block is found without those before it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import count
from typing import Protocol

import numpy as np

from soratrain.amounts import counted
from soratrain.data.balance import balanced
from soratrain.data.schedule import Schedule
from soratrain.errors import ConfigError

LOOKED_AT = 2048, 32  # micro-batches, but so many blocks, among which packs find the one with most tokens
Run = tuple[int, int, int]  # bucket, first and count: samples of its stream


class Blocks(Protocol):
    """An endless sequence of blocks."""

    def slot(self, number: int, slot: int) -> Sequence[Run]:
        """Return what `slot` computes in block `number`."""
        ...

    def counts(self, number: int) -> Mapping[int, int]:
        """Return how many samples block `number` has, by bucket."""
        ...

    @property
    def expected(self) -> list[float]:
        """How many samples of each bucket a block has, on average."""
        ...

    @property
    def largest(self) -> tuple[int, str]:
        """The most tokens of a micro-batch, and what it holds in words."""
        ...


class BucketBlocks:
    """Blocks of one bucket.

    Args:
        schedule: of blocks.
        sizes: samples of a micro-batch, by bucket.
        tokens: of a sample, by bucket.
        rates: samples of an epoch, by bucket.
        slots: micro-batches of a block.
        again: the block with most tokens is number 0 and this number.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        sizes: Sequence[int],
        tokens: Sequence[int],
        rates: Sequence[float],
        slots: int,
        again: int,
    ) -> None:
        self.schedule, self.sizes, self.tokens, self.rates = schedule, sizes, tokens, rates
        self.slots, self.again = slots, again
        costs = [(size * each, number) for number, (size, each) in enumerate(zip(sizes, tokens, strict=True))]
        self.heaviest = max(costs)[1]

    def slot(self, number: int, slot: int) -> Sequence[Run]:
        """Return what `slot` computes in block `number`: neighbours in a bucket's stream."""
        bucket, turn = self.turn(number)
        return [(bucket, (turn * self.slots + slot) * self.sizes[bucket], self.sizes[bucket])]

    def counts(self, number: int) -> Mapping[int, int]:
        """Return how many samples block `number` has, by bucket."""
        bucket, _ = self.turn(number)
        return {bucket: self.slots * self.sizes[bucket]}

    def turn(self, number: int) -> tuple[int, int]:
        """Return the bucket of block `number`, and how many blocks of that bucket came before it."""
        if number in (0, self.again):
            return self.heaviest, int(number > 0)
        bucket, turn = self.schedule[number - 1 - (number > self.again)]
        return bucket, turn + 2 * (bucket == self.heaviest)

    @property
    def expected(self) -> list[float]:
        """How many samples of each bucket a block has, on average."""
        blocks = sum(rate / size for rate, size in zip(self.rates, self.sizes, strict=True))
        return [self.slots * rate / blocks for rate in self.rates]

    @property
    def largest(self) -> tuple[int, str]:
        """The most tokens of a micro-batch, and what it holds in words."""
        return self.sizes[self.heaviest] * self.tokens[self.heaviest], counted(self.sizes[self.heaviest], "samples")


class PackBlocks:
    """Blocks of samples of any bucket, as many as cost about the same in each block, dealt out to the slots.

    Samples stand in a row, each bucket's as often as it should; block n has those that begin at a cost between n and
    n + 1 times `cost`, counted from the run's start. `cost` is the largest at which no slot's can pass `cap`, whichever
    samples meet.

    Args:
        schedule: of single samples.
        costs: of a sample, by bucket.
        tokens: of a sample, by bucket.
        rates: samples of an epoch, by bucket.
        slots: micro-batches of a block.
        cap: the most that a micro-batch may cost.
        again: the block with most tokens in a micro-batch is number 0, the one after it in that is this number.

    Raises:
        ConfigError: `cap` does not hold two of the costliest samples, so that a slot might get none.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        costs: Sequence[int],
        tokens: Sequence[int],
        rates: Sequence[float],
        slots: int,
        cap: int,
        again: int,
    ) -> None:
        self.schedule, self.costs, self.tokens, self.rates = schedule, costs, tokens, rates
        self.slots, self.again = slots, again
        if cap < 2 * max(costs):
            raise ConfigError(
                f"data.tokens_per_batch={cap}: with data.batching=pack it must hold two of the costliest samples, which"
                f" cost {max(costs)} each; set {2 * max(costs)} or more, or data.batching=bucket"
            )
        low, high = slots * (cap - max(costs)), slots * cap  # Graham's bound holds at the lower
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._worst(middle) <= cap else (low, middle)
        self.cost = low
        self._known: tuple[int, list[list[Run]]] = (-1, [])
        self.heavy, self.largest = self._heaviest()

    def slot(self, number: int, slot: int) -> Sequence[Run]:
        """Return what `slot` computes in block `number`."""
        return self._block(number)[slot]

    def counts(self, number: int) -> Mapping[int, int]:
        """Return how many samples block `number` has, by bucket."""
        return Counter(bucket for slot in self._block(number) for bucket, _, _ in slot)

    def _block(self, number: int) -> list[list[Run]]:
        if self._known[0] != number:
            if number in (0, self.again):
                place = self.heavy[number > 0]
            else:
                place = number - 1 - (number > self.again)
                for heavy in sorted(self.heavy):
                    place += place >= heavy
            self._known = number, self._dealt(place, self._samples(place))
        return self._known[1]

    def _samples(self, place: int) -> list[tuple[int, int]]:
        """Return the (bucket, turn) of the samples that begin at a cost in [place, place + 1) · cost."""
        start, end = place * self.cost, (place + 1) * self.cost
        first, last = self.schedule.latest(start, self.costs), self.schedule.latest(end, self.costs)
        begun, found = self.schedule.before(first, self.costs), []
        for bucket, turn in self.schedule.between(first, last + 1):
            if start <= begun < end:
                found.append((bucket, turn))
            begun += self.costs[bucket]
        return found

    def _dealt(self, place: int, samples: Sequence[tuple[int, int]]) -> list[list[Run]]:
        """Return the samples of each slot; which slot has the costliest changes from block to block."""
        samples = sorted(samples, key=lambda sample: -self.costs[sample[0]])
        slots = balanced(np.array([self.costs[bucket] for bucket, _ in samples]), self.slots)
        dealt: list[list[Run]] = [[] for _ in range(self.slots)]
        for (bucket, turn), slot in zip(samples, slots.tolist(), strict=True):
            dealt[(slot + place) % self.slots].append((bucket, turn, 1))
        return dealt

    def _worst(self, cost: int) -> int:
        """Return a bound on what a slot's samples cost in any block of about `cost`.

        A block spans a time in which each bucket has its share of samples, and at most one more. The slot that ends up
        with most had least when its last sample came, that is at most the mean of those before; the first `slots`
        samples find theirs empty.
        """
        total = cost + max(self.costs)
        spend = sum(rate * each for rate, each in zip(self.rates, self.costs, strict=True))
        span = (total + sum(self.costs)) / spend
        before, samples, worst = 0, 0, 0
        for each, rate in sorted(zip(self.costs, self.rates, strict=True), reverse=True):
            most = int(span * rate) + 2
            before, samples = min(before + most * each, total), samples + most
            bound = each if samples <= self.slots else -(-(before - each) // self.slots) + each
            worst = max(worst, bound)
        return worst

    def _heaviest(self) -> tuple[tuple[int, int], tuple[int, str]]:
        """Return, of the first blocks, the two with most tokens in a micro-batch; and `largest`.

        Buckets meet in ever the same proportions, so that of two thousand micro-batches hardly any later one has more.
        """
        micros, least = LOOKED_AT
        row, begun, found = map(self.schedule.__getitem__, count()), 0, []
        for place in range(max(least, micros // self.slots)):
            samples = []
            while begun < (place + 1) * self.cost:
                samples.append(next(row))
                begun += self.costs[samples[-1][0]]
            slots = self._dealt(place, samples)
            found.append((max((sum(self.tokens[bucket] for bucket, _, _ in slot), len(slot)) for slot in slots), place))
        (most, first), (_, second) = sorted(found, reverse=True)[:2]
        return (first, second), (most[0], f"a pack of {counted(most[1], 'samples')}")

    @property
    def expected(self) -> list[float]:
        """How many samples of each bucket a block has, on average."""
        spend = sum(rate * each for rate, each in zip(self.rates, self.costs, strict=True))
        return [self.cost * rate / spend for rate in self.rates]
