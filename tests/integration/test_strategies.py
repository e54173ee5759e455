"""Every strategy trains the same numbers."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from safetensors.torch import load_file
from tiny_training import Net, Spy, train

from soratrain.distributed.components import components
from soratrain.distributed.options import StrategyOptions

PARALLEL = ("ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
SLOW = ("ddp", "zero1", "zero3", "zero2_offload", "zero3_offload")


def outcome(out: str, **settings: Any) -> dict[str, float]:
    """Train and return what must not depend on the strategy: the figures of every step."""
    train(out, **settings)
    return {}


def waits(out: str, **settings: Any) -> list[timedelta | None]:
    """Train; return how long ranks wait for each other in each of the groups that were made."""
    found, init, new = [], dist.init_process_group, dist.new_group

    def begun(*arguments: Any, **kwargs: Any) -> None:
        found.append(kwargs.get("timeout"))
        init(*arguments, **kwargs)

    def made(*arguments: Any, **kwargs: Any) -> Any:
        found.append(kwargs.get("timeout"))
        return new(*arguments, **kwargs)

    dist.init_process_group, dist.new_group = begun, made
    train(out, **settings)
    return found


def test_ranks_wait_for_each_other_as_long_as_is_asked_whatever_about(tmp_path: Path) -> None:
    for found in run_ranks(waits, 2, out=str(tmp_path), strategy="ddp", ranks=2, timeout_minutes=7):
        assert found == [timedelta(minutes=7)] * 4  # for training, to stop, and two for checkpoints


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


BF16 = {"precision": "bf16-mixed", "weights": "bf16"}  # numbers of 8 bits: 1 part in 256


@pytest.mark.parametrize(
    "strategy",
    ["zero2", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero3", "zero2_offload", "zero3_offload"))],
)
@pytest.mark.parametrize("reduce", ["fp32", "bf16"])
def test_weights_in_bf16_train_as_those_in_fp32_to_the_precision_of_bf16(
    strategy: str, reduce: str, tmp_path: Path
) -> None:
    settings = {"per_step": 4, "max_steps": 8, "clip": 0.3, "ema": 0.9, "lr": 0.01}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), precision="bf16-mixed", **settings)
    run_ranks(outcome, 2, out=str(tmp_path / "two"), strategy=strategy, ranks=2, reduce=reduce, **BF16, **settings)
    first, second = steps(tmp_path / "one"), steps(tmp_path / "two")
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.02)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)
    ours, theirs = (torch.load(tmp_path / run / "whole.pt", weights_only=True) for run in ("one", "two"))
    moved = max(float((value - value.bfloat16()).abs().max()) for value in theirs.values())
    assert moved > 0, "the optimizer's weights are not those in bf16"
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=0.02, atol=0.02)


class Begun(Spy):
    """Keeps the whole weights that the optimizer begins with."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        Spy.on_train_end(self, trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass


def begun(out: str, **settings: Any) -> None:
    train(out, callbacks=[Begun(Path(out) / "begun.pt")], max_steps=1, **settings)


@pytest.mark.parametrize(
    "strategy",
    ["zero2", *(pytest.param(name, marks=pytest.mark.full) for name in ("zero3", "zero2_offload", "zero3_offload"))],
)
def test_the_optimizer_begins_with_weights_that_were_never_rounded(strategy: str, tmp_path: Path) -> None:
    run_ranks(begun, 1, out=str(tmp_path / "one"))
    run_ranks(begun, 2, out=str(tmp_path / "two"), strategy=strategy, ranks=2, **BF16)
    ours, theirs = (torch.load(tmp_path / run / "begun.pt", weights_only=True) for run in ("one", "two"))
    assert any(not torch.equal(value, value.bfloat16().float()) for value in ours.values())
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_gradients_reduced_in_bf16_differ_from_fp32_by_its_rounding_alone(strategy: str, tmp_path: Path) -> None:
    settings = {"strategy": strategy, "ranks": 2, "max_steps": 1, "optimizer": "sgd", "lr": 0.5}
    for reduce in ("fp32", "bf16"):
        run_ranks(outcome, 2, out=str(tmp_path / reduce), reduce=reduce, **settings)
    exact, rounded = (torch.load(tmp_path / reduce / "whole.pt", weights_only=True) for reduce in ("fp32", "bf16"))
    assert any(not torch.equal(value, rounded[name]) for name, value in exact.items())
    for name, value in exact.items():
        torch.testing.assert_close(value, rounded[name], rtol=0.01, atol=0.01)


def test_weights_in_bf16_without_autocast_are_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="ConfigError: strategy.weights=bf16 with trainer.precision=32-true"):
        run_ranks(outcome, 1, out=str(tmp_path), strategy="zero2", weights="bf16")


class Weigh(L.Callback):
    """Counts the bytes of gradients between two micro-batches and before the update: the most."""

    def __init__(self) -> None:
        self.bytes = 0

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.bytes = max(self.bytes, stored(param.grad for param in pl_module.parameters()))

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        optimizer = getattr(trainer.strategy, "sharded_optimizer", None)
        if optimizer is None:
            found = [param.grad for param in pl_module.parameters()]
        elif hasattr(optimizer, "grad_partitions_flat_buffer"):
            found = [optimizer.grad_partitions_flat_buffer]
        elif optimizer.cpu_offload:
            found = [holder.grad for holder in optimizer.single_partition_of_fp32_groups]
        elif optimizer.partition_gradients:
            found = [part for parts in optimizer.averaged_gradients.values() for part in parts]
        else:
            found = [param.grad for param in pl_module.parameters()]
        self.bytes = max(self.bytes, stored(found))


def stored(tensors: Iterable[torch.Tensor | None]) -> int:
    """Return the bytes in which tensors lie, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def held(out: str, **settings: Any) -> dict[str, int]:
    """Train and return the bytes that this rank holds, by component, and how many parameters there are."""
    weigh = Weigh()
    trainer, module, _ = train(out, callbacks=[weigh], **settings)
    strategy: Any = trainer.strategy
    own = [getattr(parameter, "ds_tensor", parameter) for parameter in module.parameters()]
    whole = {parameter.untyped_storage().data_ptr() for parameter in own}
    holders = [fragment.holder for fragment in strategy.fragments()]
    states = [value for o in strategy.base_optimizers() for state in o.state.values() for value in state.values()]
    return {
        "weights": stored(own),
        "gradients": weigh.bytes,
        "master": stored(holder for holder in holders if holder.untyped_storage().data_ptr() not in whole),
        "optimizer": stored(value for value in states if value.dim()),
        "average": stored(strategy.averages),
    }


@pytest.mark.parametrize("strategy", ["zero2", *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)])
@pytest.mark.parametrize("weights", ["fp32", "bf16"])
def test_a_rank_holds_of_each_component_what_is_foretold(strategy: str, weights: str, tmp_path: Path) -> None:
    if weights == "bf16" and strategy in ("ddp", "zero1"):
        pytest.skip("weights in bf16 want ZeRO-2 or -3")
    settings = {"strategy": strategy, "ranks": 2, "max_steps": 1, "ema": 0.9, "width": 128, "weights": weights}
    precision = {"precision": "bf16-mixed"} if weights == "bf16" else {}
    options = StrategyOptions(name=strategy, weights=weights)
    foretold = components([Net(width=128)], options, ranks=2, optimizer="adamw", average=True, half=False, cuda=False)
    largest = 4 * max(param.numel() for param in Net(width=128).parameters())
    for found in run_ranks(held, 2, out=str(tmp_path), **settings, **precision):
        for name, count in found.items():
            # ZeRO-2 keeps the gradient of the one parameter whole that lies in two ranks' shares
            more = largest if name == "gradients" and strategy == "zero2" else 0
            assert 0.97 * foretold.of(name) <= count <= 1.03 * foretold.of(name) + more, name
