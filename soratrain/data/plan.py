"""The order of training as arithmetic: which samples make up micro-batch i of step n, for any n, without a loop.

    stream   one bucket's samples, permuted anew each time it is used up; endless
    micro    a run of a bucket's stream: what one rank computes at a time
    block    canonical_ranks micro-batches of one bucket, so that ranks work equally long
    step     accumulate_blocks blocks; one optimizer step

Rank r of R (R divides canonical_ranks) computes accumulate_blocks · canonical_ranks / R micro-batches of a step, so
any R sees the same steps. Blocks of different buckets alternate in proportion to their rates; the block with most
tokens comes first in steps 0 and 1, so that memory runs out there or never. Nothing but (manifest, buckets, seed)
enters.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from soratrain.batch import draw_of
from soratrain.data.buckets import Assignment, Bucket
from soratrain.data.schedule import Schedule
from soratrain.errors import ConfigError

VERSION = 1  # of the order; a change that moves samples raises it
_SPLITMIX = (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB)  # Steele et al., 2014


@dataclass(frozen=True)
class Budget:
    """How many samples of a bucket make a micro-batch: a fixed number, or as many as a cost allows (at least one).

    Attributes:
        batch_size: samples, the same for every bucket; or None.
        tokens_per_batch: cost of a micro-batch, where a sample of L tokens costs L + quadratic · L²; or None.
        quadratic: attention's part; 1/(6 · width) is where attention's products cost as much as all others.
        max_batch_size: bound for small buckets.
    """

    batch_size: int | None = None
    tokens_per_batch: int | None = None
    quadratic: float = 0.0
    max_batch_size: int | None = None

    def __post_init__(self) -> None:
        if (self.batch_size is None) == (self.tokens_per_batch is None):
            raise ConfigError(
                f"data.batch_size={self.batch_size} and data.tokens_per_batch={self.tokens_per_batch}: set one of them,"
                " the other to null"
            )
        for name in ("batch_size", "tokens_per_batch", "max_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        if self.quadratic < 0:
            raise ConfigError(f"data.quadratic={self.quadratic}: must not be negative")

    def cost(self, bucket: Bucket) -> float:
        """Return what one sample costs, in tokens."""
        return bucket.tokens + self.quadratic * bucket.tokens**2

    def samples(self, bucket: Bucket) -> int:
        """Return the samples of one micro-batch."""
        if self.batch_size is not None:
            return self.batch_size
        assert self.tokens_per_batch is not None
        count = max(1, int(self.tokens_per_batch / self.cost(bucket)))
        return min(count, self.max_batch_size) if self.max_batch_size else count


@dataclass(frozen=True)
class Micro:
    """One micro-batch: optimizer step, bucket number, sample numbers [B], loss weight of each sample."""

    step: int
    bucket: int
    samples: np.ndarray
    weight: float


def permutation(count: int, *key: object) -> np.ndarray:
    """Return a permutation of `count` numbers that depends on `key` alone, not on a library's version, [count] int64.

    It sorts the numbers by a hash of (key, number), SplitMix64.
    """
    with np.errstate(over="ignore"):
        mixed = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_SPLITMIX[0]) + np.uint64(draw_of(*key))
        for shift, factor in ((30, _SPLITMIX[1]), (27, _SPLITMIX[2])):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        mixed ^= mixed >> np.uint64(31)
    return np.argsort(mixed, kind="stable")


class Plan:
    """An endless sequence of optimizer steps over the samples of an assignment.

    Args:
        assignment: buckets and their samples.
        manifest_hash: identifies the data.
        seed: of the order.
        budget: samples of a micro-batch.
        accumulate_blocks: blocks of an optimizer step.
        canonical_ranks: micro-batches of a block.
        gamma: a sample's loss weight is ∝ tokens^gamma; 0 makes an image count as much as a video, 1 each token alike.
    """

    def __init__(
        self,
        *,
        assignment: Assignment,
        manifest_hash: str,
        seed: int,
        budget: Budget,
        accumulate_blocks: int = 1,
        canonical_ranks: int = 1,
        gamma: float = 0.0,
    ) -> None:
        for name, value in (("accumulate_blocks", accumulate_blocks), ("canonical_ranks", canonical_ranks)):
            if value < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        self.assignment, self.manifest_hash, self.seed, self.budget = assignment, manifest_hash, seed, budget
        self.accumulate_blocks, self.canonical_ranks, self.gamma = accumulate_blocks, canonical_ranks, gamma
        # a bucket with fewer samples than a full block has smaller ones, so that a block shows none twice unless one
        # pass over the bucket ends in it and the next begins; both then have the draw of that step and sample
        self.sizes = tuple(
            min(budget.samples(bucket), max(1, len(members) // canonical_ranks))
            for bucket, members in zip(assignment.buckets, assignment.members, strict=True)
        )
        costs = [(size * bucket.tokens, bucket) for size, bucket in zip(self.sizes, assignment.buckets, strict=True)]
        self.heaviest = costs.index(max(costs))
        self.schedule = Schedule(
            spans=[size * canonical_ranks for size in self.sizes],
            rates=assignment.rates,
            phases=[draw_of(seed, "phase", *bucket) for bucket in assignment.buckets],
        )
        self._orders: dict[int, tuple[int, np.ndarray]] = {}
        self._totals: dict[int, float] = {}

    @property
    def micros_per_step(self) -> int:
        """Return the micro-batches of an optimizer step, over all ranks."""
        return self.accumulate_blocks * self.canonical_ranks

    def per_rank(self, world_size: int) -> int:
        """Return the micro-batches of an optimizer step that one of `world_size` ranks computes.

        Raises ConfigError where `world_size` does not divide the canonical ranks.
        """
        if self.canonical_ranks % world_size:
            allowed = [count for count in range(1, self.canonical_ranks + 1) if self.canonical_ranks % count == 0]
            raise ConfigError(
                f"{world_size} ranks do not divide data.canonical_ranks={self.canonical_ranks}; use one of {allowed}"
            )
        return self.micros_per_step // world_size

    def local(self, index: int, rank: int = 0, world_size: int = 1) -> Micro:
        """Return micro-batch `index` of `rank`, counted from the run's start; all ranks are in the same block."""
        step, within = divmod(index, self.per_rank(world_size))
        block, turn = divmod(within, self.canonical_ranks // world_size)
        return self.micro(step, block * self.canonical_ranks + turn * world_size + rank)

    def micro(self, step: int, number: int) -> Micro:
        """Return micro-batch `number` (of `micros_per_step`) of `step`."""
        block, slot = divmod(number, self.canonical_ranks)
        bucket, turn = self.block(step * self.accumulate_blocks + block)
        size = self.sizes[bucket]
        first = (turn * self.canonical_ranks + slot) * size
        weight = self.assignment.buckets[bucket].tokens ** self.gamma / self._step_total(step)
        return Micro(step, bucket, self.stream(bucket, first, size), weight)

    def block(self, number: int) -> tuple[int, int]:
        """Return the bucket of block `number`, and how many blocks of that bucket came before it."""
        if number in (0, self.accumulate_blocks):
            return self.heaviest, int(number > 0)
        number -= 1 + (number > self.accumulate_blocks)
        bucket, turn = self.schedule[number]
        return bucket, turn + 2 * (bucket == self.heaviest)

    def stream(self, bucket: int, first: int, count: int) -> np.ndarray:
        """Return samples `first` to `first + count` of a bucket's endless stream, [count] int64."""
        members = self.assignment.members[bucket]
        places = np.arange(first, first + count)
        epochs = places // len(members)
        found = np.empty(count, dtype=np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            if self._orders.get(bucket, (-1,))[0] != epoch:
                key = (self.seed, "order", *self.assignment.buckets[bucket], epoch)
                self._orders[bucket] = epoch, permutation(len(members), *key)
            mask = epochs == epoch
            found[mask] = members[self._orders[bucket][1][places[mask] % len(members)]]
        return found

    def substitute(self, bucket: int, draw: int, attempt: int) -> int:
        """Return the sample that replaces an unreadable one, which had `draw`."""
        members = self.assignment.members[bucket]
        return int(members[draw_of(draw, "substitute", attempt) % len(members)])

    def _step_total(self, step: int) -> float:
        if step not in self._totals:
            first = step * self.accumulate_blocks
            buckets = [self.block(first + block)[0] for block in range(self.accumulate_blocks)]
            weights = [self.sizes[bucket] * self.assignment.buckets[bucket].tokens ** self.gamma for bucket in buckets]
            self._totals = {step: self.canonical_ranks * sum(weights)}
        return self._totals[step]

    @property
    def bucket_hash(self) -> str:
        """Identify the buckets, what is in them, and all that sets the order besides the data and the seed."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(
            repr((self.assignment.buckets, self.sizes, self.assignment.rates, self.accumulate_blocks)).encode()
        )
        digest.update(repr(float(self.gamma)).encode())
        for members in self.assignment.members:
            digest.update(members.astype("<i8").tobytes())
        return digest.hexdigest()

    def state(self, consumed: int) -> dict[str, Any]:
        """Return all that resuming needs; `consumed` counts micro-batches over all ranks."""
        return {
            "version": VERSION,
            "seed": self.seed,
            "consumed_microbatches": consumed,
            "manifest_hash": self.manifest_hash,
            "bucket_hash": self.bucket_hash,
            "canonical_ranks": self.canonical_ranks,
        }

    def check(self, state: Mapping[str, Any]) -> int:
        """Return the consumed micro-batches of `state`. Raises ConfigError where it is of another plan."""
        whys = {
            "version": "another version of the order wrote it; go on with that version, or start over with fresh=true",
            "seed": "set the same seed, or start over with fresh=true",
            "manifest_hash": "it is another dataset; point inputs to the one before, or start over with fresh=true",
            "canonical_ranks": f"set data.canonical_ranks={state.get('canonical_ranks')}",
            "bucket_hash": "buckets, batch sizes or data.accumulate_blocks changed; undo it, or use fresh=true",
        }
        own = self.state(0)
        for name, why in whys.items():
            if state.get(name) != own[name]:
                raise ConfigError(f"the checkpoint's {name} is {state.get(name)}, this run's is {own[name]}: {why}")
        return int(state["consumed_microbatches"])
