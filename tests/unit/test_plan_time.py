"""How long a step takes is a sum that can be done by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from soratrain.distributed.options import StrategyOptions
from soratrain.stages.plan_device import Device
from soratrain.stages.plan_time import OPERATIONS, PASSES, StepTime, Work, step_time, volumes

BENCH = str(Path(__file__).parents[1] / "bench")

DEVICE = Device(
    bf16_tflops=100,
    fp32_tflops=50,
    matmul=0.5,
    attention=0.25,
    memory_gib=80,
    memory_gb_s=1000,
    intra_gb_s=100,
    inter_gb_s=50,
    host_gb_s=20,
    host_memory_gb_s=40,
    per_node=8,
    hidden=0.0,
    launch_us=0.0,
)
WORK = Work(products=1e13, attention=5e12, kept=1e10, blocks=10, parameters=10**9)


def time(name: str = "single", *, ranks: int = 1, nodes: int = 1, work: Work = WORK, **settings: str) -> StepTime:
    options = StrategyOptions(name=name, **settings)
    return step_time(work, options, DEVICE, ranks=ranks, nodes=nodes, half=True)


def test_a_single_process_computes_and_passes_over_its_memory() -> None:
    found = time()
    assert found.computing == pytest.approx(3 * 1e13 / 50e12 + 3.5 * 5e12 / 25e12)
    assert found.memory == pytest.approx(12 * 1e10 / 1e12)
    assert found.optimizer == pytest.approx(10 * 4e9 / 1e12) and found.messages == found.host == 0
    assert found.utilisation == pytest.approx(4.5e13 / (100e12 * found.total))
    again = time(work=replace(WORK, again=(0.5, 1.0)))
    assert again.again == pytest.approx(0.5 * 0.2 + 0.2) and again.utilisation < found.utilisation
    assert again.memory == pytest.approx((12 + 3.7) * 1e10 / 1e12)


def test_what_is_computed_again_starts_its_operations_again() -> None:
    device, none = replace(DEVICE, launch_us=6.0), replace(WORK, kept=0.0, micro_batches=4)
    found = [
        step_time(work, StrategyOptions(name="single"), device, ranks=1, nodes=1, half=True).memory
        for work in (none, replace(none, again=(1.0, 1.0)))
    ]
    assert found == pytest.approx([4 * 10 * 200 * 6e-6, 4 * 10 * 272 * 6e-6])


@pytest.mark.parametrize(
    ("name", "buffers"), [("ddp", 2), ("zero1", 2), ("zero2", 2), ("zero3", 3), ("zero2_offload", 2)]
)
def test_each_strategy_sends_what_its_paper_says(name: str, buffers: int) -> None:
    """In fp32, one micro-batch: Psi numbers are scattered and gathered, under ZeRO-3 gathered once more."""
    assert sum(volumes(StrategyOptions(name=name), 10**9, 1)) == buffers * 4e9
    found = time(name, ranks=4)
    assert found.messages == pytest.approx(buffers * 4e9 * 3 / 4 / 100e9)
    assert time(name, ranks=16, nodes=2).messages == pytest.approx(buffers * 4e9 * 15 / 16 / 50e9)


def test_micro_batches_cost_messages_only_where_gradients_or_weights_are_sharded() -> None:
    for name, once, four in (("ddp", 8, 8), ("zero1", 8, 8), ("zero2", 8, 20), ("zero3", 12, 48)):
        sent = [sum(volumes(StrategyOptions(name=name), 10**9, count)) / 1e9 for count in (1, 4)]
        assert sent == [once, four]
    halved = StrategyOptions(name="zero3", weights="bf16", reduce="bf16")
    assert sum(volumes(halved, 10**9, 1)) == 6e9


def test_messages_hide_under_computing_as_far_as_there_is_some() -> None:
    device = replace(DEVICE, hidden=0.5)
    whole, hidden = (
        step_time(WORK, StrategyOptions(name="zero3"), item, ranks=4, nodes=1, half=True) for item in (DEVICE, device)
    )
    assert hidden.messages == 0 < whole.messages
    slow = replace(device, intra_gb_s=1)
    found = step_time(WORK, StrategyOptions(name="zero3"), slow, ranks=4, nodes=1, half=True)
    assert found.messages == pytest.approx(9.0 - 0.5 * (found.computing + found.memory))


def test_what_ranks_exchange_that_share_their_tokens_comes_on_top() -> None:
    apart, shared = time("zero2", ranks=4), time("zero2", ranks=4, work=replace(WORK, exchanged=1e10))
    assert shared.messages - apart.messages == pytest.approx(1e10 / 100e9)


def test_offload_pays_with_the_hosts_memory_and_the_way_there() -> None:
    two, three = time("zero2_offload", ranks=4), time("zero3_offload", ranks=4)
    assert two.optimizer == pytest.approx(10 * 1e9 / 40e9) == three.optimizer
    assert two.host == pytest.approx(0.25e9 * 8 / 20e9) and three.host == pytest.approx(0.25e9 * 16 / 20e9)


@pytest.mark.parametrize("half", [True, False])
def test_the_constants_are_what_a_block_counts_to(half: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from counting import operations, passes

    assert OPERATIONS[half] == pytest.approx(operations(half=half), rel=0.1)
    assert PASSES[half] == pytest.approx(passes(half=half), rel=0.1)
    for recompute in ("selective", "full"):
        forwards, every = operations(half=half, recompute=recompute, clip=(4, 16, 16))
        assert (OPERATIONS[half][0], sum(OPERATIONS[half])) == pytest.approx((forwards, every), rel=0.1)


def test_published_runs_took_longer_than_foretold_and_less_than_twice_as_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCH)
    from bench_predict import PUBLISHED, published

    ratios = [float(row["measured / foretold"]) for row in published()]
    assert len(ratios) == len(PUBLISHED) and min(ratios) > 1 and max(ratios) < 2, ratios
