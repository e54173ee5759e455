"""The order of training as arithmetic: which samples make up micro-batch i of step n, for any n, without a loop.

    stream   one bucket's samples, shuffled anew each time it is used up; endless (`Streams`)
    micro    what one rank computes at a time: samples of one bucket, or a pack of any
    block    canonical_ranks micro-batches that cost the same, so that ranks work equally long (`Blocks`)
    step     accumulate_blocks blocks; one optimizer step

Rank r of R (R divides canonical_ranks) computes accumulate_blocks · canonical_ranks / R micro-batches of a step, so
any R sees the same steps. Blocks of different buckets alternate in proportion to their rates; the block with most
tokens comes first in steps 0 and 1, so that memory runs out there or never. Nothing but (manifest, buckets, seed)
enters.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from soratrain.batch import draw_of
from soratrain.data.assignment import Assignment
from soratrain.data.blocks import Blocks, BucketBlocks, PackBlocks
from soratrain.data.budget import Budget
from soratrain.data.manifest import Manifest
from soratrain.data.order import Streams
from soratrain.data.schedule import Schedule
from soratrain.errors import ConfigError

VERSION = 3  # of the order; a change that moves samples raises it


@dataclass(frozen=True)
class Micro:
    """One micro-batch: optimizer step; of each sample its bucket's number, its own number [B], its loss weight."""

    step: int
    buckets: tuple[int, ...]
    samples: np.ndarray
    weights: tuple[float, ...]


class Plan:
    """An endless sequence of optimizer steps over the samples of an assignment.

    Args:
        assignment: buckets and their samples.
        manifest: the data.
        seed: of the order.
        budget: samples of a micro-batch.
        batching: `bucket`: a block's samples share a bucket; `pack`: they have any size, and slots cost the same.
        accumulate_blocks: blocks of an optimizer step.
        canonical_ranks: micro-batches of a block.
        gamma: a sample's loss weight is ∝ tokens^gamma; 0 makes an image count as much as a video, 1 each token alike.
        window: shards whose samples are mixed (see `Streams`).
    """

    def __init__(
        self,
        *,
        assignment: Assignment,
        manifest: Manifest,
        seed: int,
        budget: Budget,
        batching: str = "bucket",
        accumulate_blocks: int = 1,
        canonical_ranks: int = 1,
        gamma: float = 0.0,
        window: int = 64,
    ) -> None:
        checked = {"accumulate_blocks": accumulate_blocks, "canonical_ranks": canonical_ranks, "window": window}
        for name, value in checked.items():
            if value < 1:
                raise ConfigError(f"data.{name}={value}: must be at least 1")
        self.assignment, self.manifest_hash, self.seed, self.budget = assignment, manifest.hash, seed, budget
        self.batching, self.window = batching, window
        self.accumulate_blocks, self.canonical_ranks, self.gamma = accumulate_blocks, canonical_ranks, gamma
        self.worth = [bucket.tokens**gamma for bucket in assignment.buckets]
        if batching not in ("bucket", "pack"):
            raise ConfigError(f"data.batching={batching!r} is not there; use bucket or pack")
        packs = batching == "pack"
        # a bucket with fewer samples than a full block has smaller ones, so that a block shows none twice unless one
        # pass over the bucket ends in it and the next begins; both then have the draw of that step and sample
        self.sizes = tuple(
            1 if packs else min(budget.samples(bucket), max(1, len(members) // canonical_ranks))
            for bucket, members in zip(assignment.buckets, assignment.members, strict=True)
        )
        schedule = Schedule(
            spans=[1 if packs else size * canonical_ranks for size in self.sizes],
            rates=assignment.rates,
            phases=[draw_of(seed, "phase", *name) for name in assignment.names],
        )
        common: dict[str, Any] = {"slots": canonical_ranks, "again": accumulate_blocks, "rates": assignment.rates}
        common["tokens"] = [bucket.tokens for bucket in assignment.buckets]
        self.blocks: Blocks
        if packs:
            costs = [math.ceil(budget.cost(bucket)) for bucket in assignment.buckets]
            self.blocks = PackBlocks(schedule, costs=costs, cap=budget.cap, **common)
        else:
            self.blocks = BucketBlocks(schedule, sizes=self.sizes, **common)
        self.streams = Streams(
            assignment=assignment,
            manifest=manifest,
            sizes=self.sizes,
            slots=1 if packs else canonical_ranks,
            seed=seed,
            window=window,
        )
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
        runs = self.blocks.slot(step * self.accumulate_blocks + block, slot)
        total = self._step_total(step)
        return Micro(
            step=step,
            buckets=tuple(bucket for bucket, _, count in runs for _ in range(count)),
            samples=np.concatenate([self.streams.take(*run) for run in runs]),
            weights=tuple(self.worth[bucket] / total for bucket, _, count in runs for _ in range(count)),
        )

    def substitute(self, bucket: int, draw: int, attempt: int) -> int:
        """Return the sample that replaces an unreadable one, which had `draw`."""
        members = self.assignment.members[bucket]
        return int(members[draw_of(draw, "substitute", attempt) % len(members)])

    def _step_total(self, step: int) -> float:
        if step not in self._totals:
            blocks = range(step * self.accumulate_blocks, (step + 1) * self.accumulate_blocks)
            counts = [item for block in blocks for item in self.blocks.counts(block).items()]
            self._totals = {step: sum(self.worth[bucket] * count for bucket, count in counts)}
        return self._totals[step]

    @property
    def bucket_hash(self) -> str:
        """Identify the buckets, what is in them, and all that sets the order besides the data and the seed."""
        digest = hashlib.blake2b(digest_size=16)
        packs = (self.budget.cap, self.budget.quadratic) if self.batching == "pack" else ()
        order = (self.batching, *packs, self.window, self.accumulate_blocks, float(self.gamma))
        digest.update(repr((self.assignment.buckets, self.sizes, self.assignment.rates, *order)).encode())
        for numbers in (self.streams.manifest.shard, *self.assignment.members):  # windows are of shards
            digest.update(numbers.astype("<i8").tobytes())
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
            "bucket_hash": "buckets, batch sizes, data.accumulate_blocks, data.gamma, data.window, validation.clips"
            " or which shard holds a sample (task=repack) changed; undo it, or use fresh=true",
        }
        own = self.state(0)
        for name, why in whys.items():
            if state.get(name) != own[name]:
                raise ConfigError(f"the checkpoint's {name} is {state.get(name)}, this run's is {own[name]}: {why}")
        return int(state["consumed_microbatches"])
