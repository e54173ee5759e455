"""Every strategy trains the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_training import train

from soratrain.distributed.memory import kept

PARALLEL = ("ddp", "zero1", "zero2", "zero3")
SLOW = ("ddp", "zero1", "zero3")


def outcome(out: str, **settings: Any) -> dict[str, float]:
    """Train and return what must not depend on the strategy: the figures of every step."""
    train(out, **settings)
    return {}


def steps(out: Path) -> list[dict[str, float]]:
    """Return the figures of every step, less those that time decides."""
    from soratrain.callbacks.metrics import NOT_REPEATABLE, read_rows

    rows = read_rows(out / "metrics.csv")
    return [{key: float(value) for key, value in row.items() if value and key not in NOT_REPEATABLE} for row in rows]


def same_training(left: Path, right: Path) -> None:
    """Compare losses, gradient norms and final weights to fp32 rounding."""
    first, second = steps(left), steps(right)
    assert len(first) == len(second) > 0
    for one, other in zip(first, second, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
    ours, theirs = torch.load(left / "whole.pt", weights_only=True), torch.load(right / "whole.pt", weights_only=True)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", PARALLEL)
def test_one_accumulated_sgd_step_equals_the_single_process_one(strategy: str, tmp_path: Path) -> None:
    settings = {"per_step": 8, "max_steps": 1, "optimizer": "sgd", "lr": 0.5}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), **settings)
    run_ranks(outcome, 2, out=str(tmp_path / "two"), strategy=strategy, ranks=2, **settings)
    same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
def test_clipped_training_and_its_average_equal_the_single_process_ones(strategy: str, tmp_path: Path) -> None:
    settings = {"per_step": 4, "max_steps": 5, "clip": 0.3, "ema": 0.9}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), **settings)
    run_ranks(outcome, 2, out=str(tmp_path / "two"), strategy=strategy, ranks=2, **settings)
    same_training(tmp_path / "one", tmp_path / "two")
    exported = [load_file(tmp_path / run / "weights" / "net.safetensors") for run in ("one", "two")]
    for name, value in exported[0].items():
        torch.testing.assert_close(value, exported[1][name], rtol=1e-4, atol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("strategy", PARALLEL)
def test_autocast_to_bf16_computes_the_same_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    settings = {"per_step": 2, "max_steps": 3, "precision": "bf16-mixed"}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), **settings)
    run_ranks(outcome, 2, out=str(tmp_path / "two"), strategy=strategy, ranks=2, **settings)
    run_ranks(outcome, 1, out=str(tmp_path / "fp32"), **{**settings, "precision": "32-true"})
    same_training(tmp_path / "one", tmp_path / "two")
    assert steps(tmp_path / "one")[0]["loss"] != steps(tmp_path / "fp32")[0]["loss"]


def test_muon_under_zero_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match="ConfigError: optimizer.name=muon needs whole matrices and ZeRO slices them"
    ):
        run_ranks(outcome, 2, out=str(tmp_path), strategy="zero2", ranks=2, optimizer="muon")


def test_a_limit_that_follows_the_norms_is_refused_under_zero_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ConfigError: optimizer.clip_adaptive: under ZeRO the engine clips"):
        run_ranks(outcome, 2, out=str(tmp_path), strategy="zero2", ranks=2, clip_adaptive=3.0)


def held(out: str, **settings: Any) -> dict[str, float]:
    """Train and return how many parameters there are, and the bytes of weights, copies, moments and averages here."""
    trainer, module, _ = train(out, **settings)
    strategy: Any = trainer.strategy
    parameters = list(module.parameters())
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]
    holders = [fragment.holder for fragment in strategy.fragments()]
    states = [value for o in strategy.base_optimizers() for state in o.state.values() for value in state.values()]
    tensors = [*own, *holders, *strategy.averages, *(value for value in states if value.dim())]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    count = sum(getattr(parameter, "ds_numel", parameter.numel()) for parameter in parameters)
    return {"parameters": count, "bytes": sum(storages.values())}


@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
def test_a_rank_holds_what_is_foretold(strategy: str, tmp_path: Path) -> None:
    settings = {"strategy": strategy, "ranks": 2, "max_steps": 1, "ema": 0.9, "width": 128}
    zero = int(strategy[4:]) if strategy.startswith("zero") else 0
    for found in run_ranks(held, 2, out=str(tmp_path), **settings):
        told = kept(int(found["parameters"]), zero=zero, ranks=2, moments=2, average=True)
        assert found["bytes"] == pytest.approx(told.total - told.gradients, rel=0.02)
