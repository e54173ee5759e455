"""Promises of the order: each pass whole, windows of shards, and a stretch of them for each slot."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from data_tiny import manifest

from soratrain.data.buckets import Native
from soratrain.data.budget import Budget
from soratrain.data.order import Streams, permutation
from soratrain.data.plan import Plan

WIDE, TALL, STILL = (48, 80, 17), (80, 48, 17), (64, 64, 1)
SHAPES = [(WIDE, TALL, WIDE, STILL)[number % 4] for number in range(3840)]


def make(*, window: int = 4, ranks: int = 4, per_shard: int = 48, size: int = 2, seed: int = 0, **kwargs) -> Plan:
    data = manifest(SHAPES, per_shard=per_shard)
    assignment = Native().assign(data, lambda bucket: 1)
    return Plan(
        assignment=assignment,
        manifest=data,
        seed=seed,
        budget=Budget(batch_size=size),
        canonical_ranks=ranks,
        window=window,
        **kwargs,
    )


def test_the_first_samples_of_a_stream_are_these():
    streams = make().streams
    assert streams.take(0, 0, 8).tolist() == FIRST
    assert streams.take(0, 5, 3).tolist() == FIRST[5:]


FIRST = [106, 116, 966, 996, 916, 930, 1346, 1374]


def test_a_pass_is_whole_windows_of_shards_in_an_order_of_its_own():
    plan = make()
    seen = []
    for turn in range(3):
        for bucket, members in enumerate(plan.assignment.members):
            one = plan.streams.take(bucket, turn * len(members), len(members))
            assert sorted(one.tolist()) == members.tolist()
            shards = plan.streams.manifest.shard[one]
            windows = [set(part.tolist()) for part in np.split(shards, 20)]
            assert all(len(window) == 4 for window in windows) and len(set.union(*windows)) == 80
            seen.append([frozenset(window) for window in windows])
    assert seen[0] == seen[1] == seen[2], "all buckets go through the same shards together"
    assert seen[0] != seen[3] != seen[6]


def test_a_rank_reads_a_stretch_of_the_shards_whatever_the_bucket():
    plan = make(ranks=4, window=4)
    places = plan.streams._shard_places(0)  # where a shard stands in the first pass
    stretch: dict[int, list[int]] = {rank: [] for rank in range(4)}
    for index in range(20):  # of the 24 blocks that a window has
        for rank in range(4):
            samples = plan.local(index, rank, 4).samples
            stretch[rank] += (places[samples // 48] * 48 + samples % 48).tolist()
    for seen in stretch.values():
        assert len(seen) == 40 and max(seen) - min(seen) < 60, "a quarter of 192, and what is cut unevenly"
    first = [sorted(seen)[20] for seen in stretch.values()]
    assert first == sorted(first) and first[3] - first[0] > 120


def test_a_run_is_shuffled():
    plan = make(ranks=1, window=4)
    first = plan.streams.take(0, 0, 60)
    assert np.abs(np.diff(first)).mean() > 20
    assert plan.streams.take(0, 0, 60).tolist() != make(ranks=1, window=4, seed=1).streams.take(0, 0, 60).tolist()


@pytest.mark.parametrize("options", [{"window": 1}, {"window": 1000}, {"ranks": 64}, {"per_shard": 4000}, {"size": 7}])
def test_whatever_the_window_and_the_ranks_nothing_is_lost(options):
    plan = make(**options)
    for bucket, members in enumerate(plan.assignment.members):
        for turn in (0, 1, 7):
            assert sorted(plan.streams.take(bucket, turn * len(members), len(members)).tolist()) == members.tolist()


def test_a_stream_is_the_same_wherever_one_enters_it():
    whole = make().streams.take(0, 0, 4500)
    other = make().streams
    for start in (4400, 3, 2200, 1919, 1921, 0, 3840):
        assert other.take(0, start, 100).tolist() == whole[start : start + 100].tolist()


def test_shards_that_hold_none_of_a_bucket_do_no_harm():
    data = replace(
        manifest([(64, 64, 17)] * 11),
        shard=np.repeat([0, 3, 9], [5, 2, 4]),
        shards=tuple(f"{number}.tar" for number in range(12)),
    )
    found = Native().assign(data, lambda bucket: 1)
    streams = Streams(assignment=found, manifest=data, sizes=[3], slots=2, seed=0, window=2)
    assert [sorted(streams.take(0, turn * 11, 11).tolist()) for turn in range(5)] == [list(range(11))] * 5


def test_a_permutation_is_arithmetic():
    assert permutation(8, 0, "a").tolist() == [0, 3, 4, 5, 1, 7, 2, 6]
    assert sorted(permutation(1000, 3).tolist()) == list(range(1000))
    assert permutation(8, 0, "a").tolist() != permutation(8, 1, "a").tolist()
