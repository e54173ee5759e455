from __future__ import annotations

import pickle
from collections import Counter

import numpy as np
import pytest
from data_tiny import manifest

from soratrain.data.buckets import Native
from soratrain.data.budget import Budget
from soratrain.data.plan import Plan
from soratrain.data.schedule import CHUNK, Schedule
from soratrain.errors import ConfigError

SHAPES = [(64, 64, 17)] * 20 + [(48, 80, 17)] * 9 + [(64, 64, 9)] * 7 + [(64, 64, 1)] * 11


def make(
    shapes=SHAPES, *, seed: int = 0, budget: Budget | None = None, ranks: int = 4, per_shard=None, **kwargs
) -> Plan:
    data, budget = manifest(shapes, per_shard=per_shard), budget or Budget(batch_size=2)
    assignment = Native().assign(data, lambda bucket: 1)
    return Plan(assignment=assignment, manifest=data, seed=seed, budget=budget, canonical_ranks=ranks, **kwargs)


def test_the_first_epoch_has_this_order():
    plan = make([(64, 64, 17)] * 6 + [(64, 64, 1)] * 4, ranks=1)
    seen = [plan.local(index).samples.tolist() for index in range(7)]
    assert seen == [[3, 0], [1, 2], [4, 5], [6, 8], [0, 1], [4, 2], [9, 7]]


def test_each_pass_of_a_bucket_shows_every_sample_once_in_an_order_of_its_own():
    plan = make()
    for bucket, members in enumerate(plan.assignment.members):
        passes = [plan.streams.take(bucket, len(members) * turn, len(members)).tolist() for turn in range(3)]
        assert all(sorted(one) == members.tolist() for one in passes)
        assert len({tuple(one) for one in passes}) == 3


def test_a_stream_is_the_same_however_it_is_cut():
    plan = make()
    whole = plan.streams.take(0, 0, 50)
    assert np.concatenate([plan.streams.take(0, start, 5) for start in range(0, 50, 5)]).tolist() == whole.tolist()
    assert make().streams.take(0, 45, 5).tolist() == whole[45:].tolist()


@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_number_of_ranks_computes_the_same_steps(accumulate):
    plan = make(ranks=4, accumulate_blocks=accumulate)

    def step(number: int, world_size: int) -> list[tuple[int, tuple[int, ...], float]]:
        each = plan.per_rank(world_size)
        micros = [
            plan.local(number * each + turn, rank, world_size) for turn in range(each) for rank in range(world_size)
        ]
        return [(micro.buckets, tuple(micro.samples.tolist()), micro.weights) for micro in micros]

    for number in (0, 1, 7, 5000):
        assert step(number, 1) == step(number, 2) == step(number, 4)
        assert sum(sum(weights) for _, _, weights in step(number, 1)) == pytest.approx(1)


def test_ranks_work_on_one_bucket_at_a_time():
    plan = make(ranks=4, accumulate_blocks=2)
    for index in range(60):
        assert len({bucket for rank in range(2) for bucket in plan.local(index, rank, 2).buckets}) == 1


def test_a_number_of_ranks_that_does_not_divide_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match=r"3 ranks .* use one of \[1, 2, 4\]"):
        make(ranks=4).per_rank(3)


def test_the_heaviest_block_comes_first_in_the_first_two_steps():
    for accumulate in (1, 3):
        plan = make(ranks=1, accumulate_blocks=accumulate, budget=Budget(tokens_per_batch=200))
        heavy = max(size * bucket.tokens for size, bucket in zip(plan.sizes, plan.assignment.buckets, strict=True))
        for step in (0, 1):
            bucket = plan.micro(step, 0).buckets[0]
            assert plan.sizes[bucket] * plan.assignment.buckets[bucket].tokens == heavy
        turns = [plan.blocks.turn(number) for number in range(200)]
        assert len(set(turns)) == 200
        for bucket in range(len(plan.sizes)):
            assert sorted(turn for one, turn in turns if one == bucket) == list(
                range(Counter(b for b, _ in turns)[bucket])
            )


def test_blocks_come_as_often_as_their_samples_at_every_scale():
    plan = make(ranks=1)
    share = np.array([len(part) for part in plan.assignment.members]) / len(SHAPES)
    order = np.array([plan.blocks.schedule[number][0] for number in range(3 * CHUNK)])
    for start in range(0, 3 * CHUNK - 200, 177):
        counts = np.bincount(order[start : start + 200], minlength=len(share))
        assert np.abs(counts - 200 * share).max() <= len(share)


def test_a_block_is_found_without_those_before_it():
    options = dict(spans=[4, 8, 4, 12], rates=[20, 9, 7, 11.5], phases=[5, 5, 60000, 123])
    walked, fresh = Schedule(**options), Schedule(**options)
    seen = Counter()
    for number in range(3 * CHUNK + 5):
        bucket, turn = walked[number]
        assert turn == seen[bucket]
        if number % 401 == 0:
            assert fresh[number] == (bucket, turn)
        seen[bucket] += 1
    assert Schedule(**options)[3 * CHUNK + 4] == walked[3 * CHUNK + 4]


def test_blocks_at_equal_times_are_neither_lost_nor_doubled():
    schedule = Schedule(spans=[1] * 5, rates=[1.0] * 5, phases=[0] * 5)
    assert [schedule[number] for number in range(12)] == [(number % 5, number // 5) for number in range(12)]
    found = [schedule[number] for number in range(CHUNK - 7, CHUNK + 7)]
    assert found == [(number % 5, number // 5) for number in range(CHUNK - 7, CHUNK + 7)]


def test_a_step_far_ahead_is_found_at_once():
    plan = make(ranks=1)
    assert plan.local(10**9).step == 10**9


def test_cost_sets_the_batch_size():
    plan = make(budget=Budget(tokens_per_batch=320), ranks=1)
    assert {str(b): n for b, n in zip(plan.assignment.buckets, plan.sizes, strict=True)} == {
        "64x64x17": 4,
        "80x48x17": 4,
        "64x64x9": 6,
        "64x64x1": 11,
    }
    assert Budget(tokens_per_batch=320, quadratic=0.1).samples(plan.assignment.buckets[-1]) == 1
    assert Budget(tokens_per_batch=320, max_batch_size=8).samples(plan.assignment.buckets[1]) == 8
    assert Budget(tokens_per_batch=1).samples(plan.assignment.buckets[-1]) == 1


def test_a_block_shows_no_sample_twice_unless_ranks_outnumber_samples():
    plan = make(budget=Budget(batch_size=100), ranks=4)
    assert sorted(plan.sizes) == [1, 2, 2, 5]
    for bucket, size in enumerate(plan.sizes):
        first = plan.streams.take(bucket, 0, size * 4).tolist()
        assert len(set(first)) == len(first)
    assert make([(64, 64, 17)] * 3, budget=Budget(batch_size=100), ranks=4).sizes == (1,)


@pytest.mark.parametrize("options", [{}, {"batch_size": 2, "tokens_per_batch": 5}, {"batch_size": 0}])
def test_a_budget_that_says_nothing_or_too_much_is_refused(options):
    with pytest.raises(ConfigError, match="data\\.batch_size"):
        Budget(**options)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_sample_weighs_as_its_tokens_to_gamma_and_a_step_sums_to_one(gamma):
    plan = make(ranks=2, accumulate_blocks=8, gamma=gamma)
    micros = [plan.micro(11, number) for number in range(16)]
    assert sum(sum(micro.weights) for micro in micros) == pytest.approx(1)
    pairs = {pair for micro in micros for pair in zip(micro.buckets, micro.weights, strict=True)}
    ratios = {weight / plan.assignment.buckets[bucket].tokens ** gamma for bucket, weight in pairs}
    assert len({bucket for bucket, _ in pairs}) > 2 and max(ratios) == pytest.approx(min(ratios))


def test_a_pickled_plan_gives_the_same_order():
    plan = make()
    copy = pickle.loads(pickle.dumps(plan))
    for index in (0, 3, 999):
        assert copy.local(index).samples.tolist() == plan.local(index).samples.tolist()


def test_the_state_is_scalars_and_goes_back_in():
    plan = make()
    state = plan.state(12)
    assert set(map(type, state.values())) <= {int, str}
    assert plan.check(state) == 12


@pytest.mark.parametrize(
    "other, key",
    [
        (dict(seed=1), "seed"),
        (dict(shapes=[*SHAPES, (64, 64, 17)]), "manifest_hash"),
        (dict(budget=Budget(batch_size=4)), "bucket_hash"),
        (dict(accumulate_blocks=2), "bucket_hash"),
        (dict(gamma=1.0), "bucket_hash"),
        (dict(window=1), "bucket_hash"),
        (dict(per_shard=5), "bucket_hash"),
        (dict(ranks=8), "canonical_ranks"),
    ],
)
def test_the_state_of_another_plan_is_refused(other, key):
    with pytest.raises(ConfigError, match=f"checkpoint's {key} is"):
        make(**other).check(make().state(0))
