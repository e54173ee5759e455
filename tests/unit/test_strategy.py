"""What strategies, trainers and stages promise before any training."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from soratrain.callbacks.checkpoint import Checkpoint
from soratrain.distributed.fragments import Fragment, assemble, whole_fragments
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer, resolve_device, resolve_devices
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage
from soratrain.stages.clipping import FIRST, AdaptiveClip


def stage(seed: int = 0, **nets: partial) -> TrainStage:
    torch.manual_seed(seed)
    return TrainStage(nets=nets, optimizer=OptimizerFactory(), schedule=Schedule(), max_steps=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "fp8"}, "trainer.precision='fp8' is unknown; use one of 32-true, bf16-mixed"),
        ({"compile": "all"}, "trainer.compile='all' is unknown; use one of none, blocks"),
        (
            {"compile": "blocks", "strategy": StrategyOptions(name="zero3")},
            "trainer.compile=blocks with strategy=zero3",
        ),
        ({"max_steps": 0}, "trainer.max_steps=0"),
        ({"devices": 2}, "trainer.devices=2 with strategy=single: use strategy=ddp"),
        ({"devices": 10_000, "strategy": StrategyOptions(name="ddp")}, "trainer.devices=10000: use auto or a number"),
        ({"devices": "two"}, "trainer.devices=two"),
        ({"num_nodes": 2}, "trainer.num_nodes=2 with strategy=single"),
        ({"accelerator": "tpu"}, "trainer.accelerator='tpu' is unknown"),
        ({"ema": 1.5}, "trainer.ema=1.5"),
        ({"keep": 0}, "trainer.keep=0"),
    ],
)
def test_a_trainer_that_cannot_work_is_refused_in_one_line(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        build_trainer(**{"out": tmp_path, "max_steps": 3, "accelerator": "cpu", **settings})
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_unknown_strategies_are_refused_and_zero_stages_are_known() -> None:
    with pytest.raises(ConfigError, match="strategy.name='fsdp' is unknown; use one of single, ddp, zero1"):
        StrategyOptions(name="fsdp")
    with pytest.raises(ConfigError, match="strategy.bucket=0"):
        StrategyOptions(bucket=0)
    assert [StrategyOptions(name=name).zero for name in ("single", "ddp", "zero1", "zero3")] == [0, 0, 1, 3]


def test_auto_is_one_process_on_cpus_and_every_device_on_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve_devices("auto", StrategyOptions(name="ddp"), "cpu") == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert resolve_device("auto") == "cuda" and resolve_device("cpu") == "cpu"
    assert resolve_devices("auto", StrategyOptions(name="zero2"), "cuda") == 4
    assert resolve_devices("auto", StrategyOptions(name="single"), "cuda") == 1


def test_asking_for_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="no CUDA device here"):
        resolve_device("cuda")


def test_a_nets_first_weights_depend_on_the_seed_and_its_name_alone() -> None:
    def built(module: TrainStage) -> TrainStage:
        torch.rand(7)  # what else has drawn numbers does not matter
        module.configure_model()
        return module

    one, other = built(stage(a=partial(nn.Linear, 3, 3))), stage(b=partial(nn.Linear, 2, 9), a=partial(nn.Linear, 3, 3))
    before = torch.random.get_rng_state()
    other.configure_model()
    assert torch.equal(one.a.weight, other.a.weight)
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(one.a.weight, built(stage(seed=1, a=partial(nn.Linear, 3, 3))).a.weight)
    twins = built(stage(a=partial(nn.Linear, 3, 3), b=partial(nn.Linear, 3, 3)))
    assert not torch.equal(twins.a.weight, twins.b.weight)
    kept = twins.a
    twins.configure_model()
    assert twins.a is kept


def test_a_net_starts_from_stored_weights_under_any_name_or_says_what_is_missing(tmp_path: Path) -> None:
    net = nn.Linear(3, 3)
    weights.save(tmp_path, "old", net, partial(nn.Linear, 3, 3), {})
    module = stage(new=partial(nn.Linear, 3, 3))
    module.start_from("new", tmp_path, "old")
    module.configure_model()
    assert torch.equal(module.new.weight, net.weight)
    with pytest.raises(DataError, match="no weights of 'new'"):
        module.start_from("new", tmp_path)
    other = stage(new=partial(nn.Linear, 4, 4))
    other.start_from("new", tmp_path, "old")
    with pytest.raises(DataError, match="do not fit Linear"):
        other.configure_model()


def test_reports_average_figures_and_sum_counts_over_micro_batches() -> None:
    module = stage()
    for loss, tokens in ((1.0, 10), (3.0, 30)):
        module.report(loss=torch.tensor(loss), tokens=tokens)
    module.report(grad_norm=5.0)
    assert {key: float(value) for key, value in module.take_reported().items()} == {
        "loss": 2.0, "tokens": 40.0, "grad_norm": 5.0
    }  # fmt: skip
    assert module.take_reported() == {}


def test_clipping_leaves_small_gradients_alone_and_reports_the_norm_before_it() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer, module = torch.optim.SGD([param], lr=1.0), stage()
    for clip, expected in ((None, [3.0, 4.0]), (10.0, [3.0, 4.0]), (1.0, [0.6, 0.8])):
        param.grad = torch.tensor([3.0, 4.0])
        module.configure_gradient_clipping(optimizer, clip)
        torch.testing.assert_close(param.grad, torch.tensor(expected), rtol=1e-5, atol=1e-5)
        assert float(module.take_reported()["grad_norm"]) == pytest.approx(5.0)


def limits(clip: AdaptiveClip, norms: list[float], ceiling: float = 0.0) -> list[float]:
    """Return the limit of each step, infinite where there is none yet."""
    found = [clip(torch.tensor(norm), ceiling) for norm in norms]
    return [math.inf if limit is None else float(limit) for limit in found]


def test_gradients_after_nothing_but_spoilt_ones_are_left_alone() -> None:
    norms = [float("nan")] * FIRST + [0.5]
    assert limits(AdaptiveClip(3.0), norms)[-1] == float("inf")
    assert limits(AdaptiveClip(3.0), norms, ceiling=1.0)[-1] == 1.0


def test_an_adaptive_limit_is_the_mean_of_the_norms_and_so_many_deviations_and_follows_them() -> None:
    clip, norms = AdaptiveClip(3.0), [1.0, 2.0] * (FIRST // 2)
    assert limits(clip, norms) == [math.inf] * FIRST
    assert limits(clip, [1.5])[0] == pytest.approx(1.5 + 3 * 0.5, rel=0.02)
    assert limits(AdaptiveClip(3.0), norms, ceiling=0.7) == pytest.approx([0.7] * FIRST)
    assert limits(clip, [1.5], ceiling=0.7) == pytest.approx([0.7])
    risen = limits(clip, [6.0] * 300)
    assert risen[0] < 4 and risen[-1] > 5.9
    assert limits(clip, [0.1] * 3000)[-1] == pytest.approx(0.1, rel=0.05)


def test_a_spike_is_clipped_and_spoils_no_average_nor_does_what_is_no_number() -> None:
    clip = AdaptiveClip(3.0)
    limits(clip, [1.0, 1.2] * 50)
    before = limits(clip, [1.1])[0]
    at, after = limits(clip, [1e6, 1.1])
    assert at == pytest.approx(before, rel=0.02) and after == pytest.approx(before, rel=0.1)
    assert clip.sums is not None
    state = clip.sums.clone()
    limits(clip, [float("nan"), float("inf")])
    assert torch.equal(state, clip.sums)


def test_an_adaptive_limit_goes_on_from_its_plain_numbers() -> None:
    norms = torch.rand(60, generator=torch.Generator().manual_seed(0)).tolist()
    whole, broken, again = AdaptiveClip(1.0), AdaptiveClip(1.0), AdaptiveClip(1.0)
    expected = limits(whole, norms)
    limits(broken, norms[:33])
    again.load_state_dict(json.loads(json.dumps(broken.state_dict())))
    assert limits(again, norms[33:]) == expected[33:]


def test_a_stage_clips_to_the_adaptive_limit_and_counts_how_often() -> None:
    param = nn.Parameter(torch.zeros(2))
    optimizer, module = torch.optim.SGD([param], lr=1.0), stage()
    module.adaptive = AdaptiveClip(3.0)
    for size in [1.0, 1.2] * 15 + [100.0]:
        param.grad = torch.tensor([0.6, 0.8]) * size
        module.take_reported()
        module.configure_gradient_clipping(optimizer, None)
    told = module.take_reported()
    assert told["grad_norm"] == pytest.approx(100.0) and told["clipped"] == 1 and told["clip_limit"] < 1.6
    torch.testing.assert_close(param.grad.norm().double(), told["clip_limit"], rtol=1e-4, atol=0)


def test_fragments_read_and_write_their_numbers_only() -> None:
    holder = torch.arange(10.0)
    fragment = Fragment("a", torch.Size([2, 4]), 3, 4, holder, offset=5, replicated=False)
    assert fragment.read().tolist() == [5, 6, 7, 8]
    fragment.write(torch.full((4,), -1.0))
    assert holder.tolist() == [0, 1, 2, 3, 4, -1, -1, -1, -1, 9]
    state = torch.zeros(10)
    fragment.write(torch.ones(4), state)
    assert state.tolist() == [0] * 5 + [1] * 4 + [0]


def test_whole_parameters_of_any_memory_format_assemble_to_themselves() -> None:
    net = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    fragments = whole_fragments(net.named_parameters())
    state = dict(assemble(fragments, [fragment.read() for fragment in fragments], torch.device("cpu")))
    assert torch.equal(state["weight"], net.weight) and torch.equal(state["bias"], net.bias)
    for fragment in fragments:
        fragment.write(fragment.read() + 1)
    assert torch.equal(state["weight"] + 1, net.weight)


def test_bad_checkpoint_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="trainer.checkpoint_every=-1"):
        Checkpoint(tmp_path, every=-1, keep=1)
