"""Promises of packs: every sample once, equal cost in every slot, never above the cap, found without a walk."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from data_tiny import manifest

from soratrain.data.blocks import PackBlocks
from soratrain.data.buckets import Native
from soratrain.data.budget import Budget
from soratrain.data.plan import Plan
from soratrain.data.schedule import Schedule
from soratrain.data.summary import remarks, summarise, table
from soratrain.errors import ConfigError

SHAPES = [(64, 64, 17)] * 90 + [(48, 80, 33)] * 40 + [(64, 64, 9)] * 70 + [(64, 64, 1)] * 110 + [(96, 128, 33)] * 11


def make(shapes=SHAPES, *, tokens: int = 1500, quadratic: float = 0.001, ranks: int = 4, **kwargs) -> Plan:
    data = manifest(shapes, per_shard=40)
    return Plan(
        assignment=Native().assign(data, lambda bucket: 1),
        manifest=data,
        seed=0,
        budget=Budget(tokens_per_batch=tokens, quadratic=quadratic),
        batching="pack",
        canonical_ranks=ranks,
        **kwargs,
    )


def cost(plan: Plan, micro) -> float:
    return sum(plan.budget.cost(plan.assignment.buckets[bucket]) for bucket in micro.buckets)


def test_each_sample_comes_once_a_pass_and_belongs_to_the_bucket_it_is_shown_in():
    plan = make()
    shown: dict[int, list[int]] = {}
    for step in range(60):
        for number in range(4):
            micro = plan.micro(step, number)
            for bucket, sample in zip(micro.buckets, micro.samples.tolist(), strict=True):
                shown.setdefault(bucket, []).append(sample)
    for bucket, members in enumerate(plan.assignment.members):
        counts = Counter(shown[bucket])
        assert set(counts) <= set(members.tolist())
        # passes end at different steps, and the two largest blocks came before their turn
        assert max(counts.values()) - min(counts.get(member, 0) for member in members.tolist()) <= 1 + 2
    shares = np.array([len(shown[bucket]) for bucket in range(len(plan.sizes))]) / sum(map(len, shown.values()))
    wanted = np.array([len(members) for members in plan.assignment.members]) / len(SHAPES)
    assert np.abs(shares - wanted).max() < 0.01


def test_blocks_put_together_are_the_row_without_a_gap():
    plan = make()
    blocks = [plan.blocks._samples(place) for place in range(40)]
    row = [sample for block in blocks for sample in block]
    assert row == [plan.blocks.schedule[number] for number in range(len(row))]
    turns = Counter(bucket for bucket, _ in row)
    for bucket, count in turns.items():
        assert [turn for one, turn in row if one == bucket] == list(range(count))
    order = [0, 1, *range(2, 40)]
    assert sorted(tuple(sorted(make().blocks.counts(n).items())) for n in order)  # none is empty
    used = Counter(run for n in order for slot in range(4) for run in plan.blocks.slot(n, slot))
    assert max(used.values()) == 1


def test_ranks_cost_the_same_and_none_passes_the_cap():
    for ranks, tokens in ((4, 2000), (16, 1400), (64, 1300)):
        plan = make(ranks=ranks, tokens=tokens)
        balances = []
        for step in range(30):
            costs = [cost(plan, plan.micro(step, number)) for number in range(ranks)]
            assert min(costs) > 0 and max(costs) <= tokens
            balances.append(sum(costs) / ranks / max(costs))
        assert np.median(balances) >= 0.97 and plan.blocks.cost / ranks > 0.6 * tokens


@pytest.mark.parametrize("seed", range(30))
def test_the_bound_on_a_slot_holds_for_any_mix(seed):
    draws = np.random.default_rng(seed)
    count, slots = int(draws.integers(1, 40)), int(draws.choice([1, 2, 5, 16]))
    costs = draws.integers(1, 1000, count).tolist()
    rates = (10 ** draws.uniform(0, 4, count)).tolist()
    cap = int(max(costs) * draws.uniform(2, 6))
    phases = draws.integers(0, 2**30, count).tolist()
    schedule = Schedule(spans=[1] * count, rates=rates, phases=phases)
    blocks = PackBlocks(schedule, costs=costs, tokens=costs, rates=rates, slots=slots, cap=cap, again=1)
    assert blocks.cost >= slots * (cap - max(costs))
    for number in (*range(20), 10**6, 10**9):
        loads = [sum(costs[bucket] for bucket, _, _ in blocks.slot(number, slot)) for slot in range(slots)]
        assert min(loads) > 0 and max(loads) <= cap


def test_the_costliest_goes_to_another_slot_each_time():
    plan = make(ranks=4)
    heavy = max(range(len(plan.sizes)), key=lambda bucket: plan.assignment.buckets[bucket].tokens)
    owners = {n for step in range(40) for n in range(4) if heavy in plan.micro(step, n).buckets}
    assert owners == {0, 1, 2, 3}


@pytest.mark.parametrize("accumulate", [1, 3])
def test_any_number_of_ranks_computes_the_same_steps(accumulate):
    plan = make(ranks=4, accumulate_blocks=accumulate)

    def step(number: int, world_size: int) -> list[tuple]:
        each = plan.per_rank(world_size)
        micros = [
            plan.local(number * each + turn, rank, world_size) for turn in range(each) for rank in range(world_size)
        ]
        return [(micro.buckets, micro.samples.tolist(), micro.weights) for micro in micros]

    for number in (0, 1, 7, 5000, 10**7):
        assert step(number, 1) == step(number, 2) == step(number, 4)
        assert sum(sum(weights) for *_, weights in step(number, 1)) == pytest.approx(1)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0])
def test_a_sample_weighs_as_its_tokens_to_gamma(gamma):
    plan = make(gamma=gamma)
    micro = max((plan.micro(3, number) for number in range(4)), key=lambda micro: len(set(micro.buckets)))
    ratios = {
        weight / plan.assignment.buckets[bucket].tokens ** gamma
        for bucket, weight in zip(micro.buckets, micro.weights, strict=True)
    }
    assert len(set(micro.buckets)) > 1 and max(ratios) == pytest.approx(min(ratios))


def test_the_largest_of_the_first_packs_comes_first_in_the_first_two_steps():
    for accumulate in (1, 3):
        plan = make(accumulate_blocks=accumulate)

        def tokens(step: int, number: int, plan: Plan = plan) -> int:
            micro = plan.micro(step, number)
            return sum(plan.assignment.buckets[bucket].tokens for bucket in micro.buckets)

        most = [max(tokens(step, number) for number in range(4)) for step in (0, 1)]
        rest = [max(tokens(step, number) for number in range(plan.micros_per_step)) for step in range(2, 9)]
        assert most[0] >= most[1] >= max(rest) and most[0] == plan.blocks.largest[0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_no_later_pack_has_more_tokens_where_few_slots_even_out_little(ranks):
    shapes = [(16 * (1 + n % 4), 16 * (1 + n // 4 % 4), 1 + 4 * (n * n // 16 % 4)) for n in range(150)]
    plan = make(shapes, tokens=600, quadratic=0.01, ranks=ranks)

    def tokens(block: int) -> int:
        slots = [plan.blocks.slot(block, slot) for slot in range(ranks)]
        return max(sum(plan.assignment.buckets[run[0]].tokens for run in slot) for slot in slots)

    assert max(tokens(block) for block in range(2, 1500)) <= tokens(1) <= tokens(0)


def test_a_cap_below_two_of_the_costliest_is_refused_with_what_would_do():
    with pytest.raises(ConfigError, match=r"tokens_per_batch=500: with data.batching=pack .* cost 619 each; set 1238"):
        make(tokens=500)
    make(tokens=1238)


@pytest.mark.parametrize("budget", [Budget(batch_size=4), Budget(tokens_per_batch=3000, max_batch_size=4)])
def test_packs_are_bounded_by_cost_alone(budget):
    data = manifest(SHAPES)
    with pytest.raises(ConfigError, match="bounded by data.tokens_per_batch alone"):
        Plan(
            assignment=Native().assign(data, lambda bucket: 1),
            manifest=data,
            seed=0,
            budget=budget,
            batching="pack",
        )


@pytest.mark.parametrize("other", [dict(tokens=1501), dict(quadratic=0.0011), dict(window=3), dict(gamma=1.0)])
def test_the_state_of_other_packs_is_refused(other):
    with pytest.raises(ConfigError, match="checkpoint's bucket_hash is"):
        make(**other).check(make().state(0))


def test_the_summary_says_what_a_pack_holds():
    plan = make()
    found = summarise(plan, manifest(SHAPES, per_shard=40))
    means = Counter()
    for step in range(1, 101):
        for number in range(4):
            means.update(plan.assignment.buckets[bucket] for bucket in plan.micro(step, number).buckets)
    for item in found["buckets"]:
        seen = next(count for bucket, count in means.items() if str(bucket) == item["bucket"]) / 400
        assert item["batch_size"] == pytest.approx(seen, rel=0.05)
    assert sum(item["blocks"] for item in found["buckets"]) == pytest.approx(1)
    assert "of tokens" in table(found)[0] and remarks(found)[0].startswith("321 samples in 5 buckets")
