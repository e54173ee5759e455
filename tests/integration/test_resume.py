"""A run that is stopped and started again is the run that was not."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_strategies import outcome, same_training, steps
from tiny_training import train

from soratrain.callbacks import export
from soratrain.callbacks.checkpoint import GracefulStop
from soratrain.distributed.checkpoint import latest_checkpoint, read_state, saved_checkpoints
from soratrain.distributed.fit import StoppedError
from soratrain.errors import DataError, DivergedError

HERE = Path(__file__).parent
SLOW = ("ddp", "zero1", "zero2", "zero2_offload", "zero3_offload")
QUICK_AND_SLOW = ["zero3", *(pytest.param(name, marks=pytest.mark.full) for name in SLOW)]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint written by one rank."""
    return load_file(folder / "rank-00000.safetensors")


def identical(left: Path, right: Path, net: str = "net") -> None:
    """Compare metrics, final checkpoints (weights, moments, averages) and exported weights bit for bit."""
    assert steps(left) == steps(right)
    one, other = latest_checkpoint(left / "checkpoints"), latest_checkpoint(right / "checkpoints")
    assert one and other and one.name == other.name
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert {key.split("/")[0] for key in first} >= {"weight", "average", "buffer"}
    state, again = read_state(one), read_state(other)
    assert state["scalars"] == again["scalars"] and state["Data"] == again["Data"]
    exported = [(out / "weights" / f"{net}.safetensors").read_bytes() for out in (left, right)]
    assert exported[0] == exported[1]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("log_every", [1, 3])
def test_stop_and_resume_equals_the_unbroken_run_bit_for_bit(optimizer: str, log_every: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "optimizer": optimizer, "ema": 0.9, "clip": 0.3, "max_steps": 7, "checkpoint_every": 2, "log_every": log_every
    }  # fmt: skip
    train(tmp_path / "whole", **settings)
    train(tmp_path / "broken", stop_at=5, **settings)  # as if killed after step 5: steps 4 to 5 are lost
    assert latest_checkpoint(tmp_path / "broken" / "checkpoints").name == "step-00000004"
    assert not (tmp_path / "broken" / "weights").exists()
    train(tmp_path / "broken", **settings)
    identical(tmp_path / "whole", tmp_path / "broken")


def test_a_limit_that_follows_the_norms_goes_on_bit_for_bit_and_is_the_same_on_all_ranks(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"clip_adaptive": 0.5, "max_steps": 30, "checkpoint_every": 4, "log_every": 3}
    train(tmp_path / "whole", ema=0.9, **settings)
    train(tmp_path / "broken", ema=0.9, stop_at=25, **settings)
    train(tmp_path / "broken", ema=0.9, **settings)
    identical(tmp_path / "whole", tmp_path / "broken")
    rows = steps(tmp_path / "whole")
    assert "clip_limit" not in rows[0] and rows[-1]["clip_limit"] > 0 and sum(row.get("clipped", 0) for row in rows) > 0
    run_ranks(outcome, 2, out=str(tmp_path / "two"), strategy="ddp", ranks=2, ema=0.9, **settings)
    same_training(tmp_path / "whole", tmp_path / "two")


def test_a_signal_saves_the_step_and_the_same_call_goes_on_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ema": 0.9, "max_steps": 6, "checkpoint_every": 0}
    train(tmp_path / "whole", **settings)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StoppedError, match="stopped at step 3 of 6"):
        train(tmp_path / "broken", interrupt=2, **settings)
    assert signal.getsignal(signal.SIGTERM) == before
    assert [folder.name for folder in saved_checkpoints(tmp_path / "broken" / "checkpoints")] == ["step-00000003"]
    train(tmp_path / "broken", **settings)
    identical(tmp_path / "whole", tmp_path / "broken")


def test_a_signal_in_the_last_step_leaves_the_export_to_the_next_start(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ema": 0.9, "max_steps": 4}
    _, _, result = train(tmp_path / "whole", **settings)
    with pytest.raises(
        StoppedError, match="stopped at step 4 of 4, before its weights were exported; the same command"
    ):
        train(tmp_path / "broken", interrupt=3, **settings)
    assert latest_checkpoint(tmp_path / "broken" / "checkpoints").name == "step-00000004"
    assert not (tmp_path / "broken" / "weights").exists()
    trainer, _, again = train(tmp_path / "broken", **settings)
    identical(tmp_path / "whole", tmp_path / "broken")
    assert again["step"] == trainer.global_step == 4 and again["loss"] == pytest.approx(result["loss"])


def told_in_export(out: str, **settings: Any) -> None:
    """Train; a signal comes to the first rank when it has two parameters of the export."""
    assemble, calls = export.assemble, count(1)

    def told(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        exporting = next(calls) == 2  # the first is the spy's
        for number, item in enumerate(assemble(*arguments)):
            if exporting and number == 2 and int(os.environ.get("LOCAL_RANK", "0")) == 0:
                signal.raise_signal(signal.SIGTERM)
            yield item

    export.assemble = told  # type: ignore[assignment]
    try:
        train(out, **settings)
    finally:
        export.assemble = assemble


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), pytest.param("zero3", 2, marks=pytest.mark.full)])
def test_a_signal_during_the_export_stops_it_on_all_ranks_and_it_alone_is_done_again(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": ranks, "ema": 0.9, "max_steps": 3}
    start = run_ranks if ranks > 1 else lambda function, _, **kwargs: function(**kwargs)
    start(outcome, ranks, out=str(tmp_path / "whole"), **settings)
    with pytest.raises((RuntimeError, StoppedError), match="(?s)" + "stopped at step 3 of 3, before its w.*" * ranks):
        start(told_in_export, ranks, out=str(tmp_path / "broken"), **settings)
    assert not [path.name for path in (tmp_path / "broken" / "weights").iterdir()]
    before = (tmp_path / "broken" / "metrics.csv").read_bytes()
    start(outcome, ranks, out=str(tmp_path / "broken"), **settings)
    assert (tmp_path / "broken" / "metrics.csv").read_bytes() == before
    exported = [(tmp_path / run / "weights" / "net.safetensors").read_bytes() for run in ("whole", "broken")]
    assert exported[0] == exported[1]


def test_a_second_ctrl_c_stops_at_once_and_a_second_sigterm_does_not() -> None:
    stop = GracefulStop(checkpoint=None)  # type: ignore[arg-type]
    old = {number: signal.signal(number, stop.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def test_ctrl_c_twice_interrupts_at_once_and_the_last_checkpoint_stands(tmp_path: Path) -> None:
    class Impatient(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as stopped:
        train(tmp_path, max_steps=6, checkpoint_every=2, callbacks=[Impatient()])
    assert not isinstance(stopped.value, StoppedError)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


def test_a_damaged_newest_checkpoint_is_skipped_and_said_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train(tmp_path, max_steps=6, checkpoint_every=2, stop_at=5)
    newest = tmp_path / "checkpoints" / "step-00000004"
    content = bytearray((newest / "rank-00000.safetensors").read_bytes())
    content[-5] ^= 1
    (newest / "rank-00000.safetensors").write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"
    assert "step-00000004" in caplog.text and "checksum" in caplog.text
    (newest / "rank-00000.safetensors").write_bytes(content[:-9])
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"
    (newest / "state.json").unlink()
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    train(tmp_path, max_steps=7, checkpoint_every=1, keep=3)
    kept = [folder.name for folder in saved_checkpoints(tmp_path / "checkpoints")]
    assert kept == ["step-00000005", "step-00000006", "step-00000007"]
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_a_finished_run_can_be_prolonged(tmp_path: Path) -> None:
    train(tmp_path, max_steps=3)
    trainer, _, _ = train(tmp_path, max_steps=5)
    assert trainer.global_step == 5
    assert [row["step"] for row in steps(tmp_path)] == [1, 2, 3, 4, 5]


def test_a_checkpoint_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    train(tmp_path, max_steps=3)
    with pytest.raises(DataError, match=r"another model: net.enter.bias is \[10\] there and \[12\] here"):
        train(tmp_path, max_steps=5, width=12)


def test_a_loss_that_is_no_number_ends_the_run_and_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(DivergedError, match="loss is nan at step 4"):
        train(tmp_path, max_steps=6, checkpoint_every=1, poison=3, log_every=3)
    newest = latest_checkpoint(tmp_path / "checkpoints")
    assert newest.name == "step-00000003"
    assert all(value.isfinite().all() for value in tensors(newest).values())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_where_a_stage_bears_it_a_step_that_is_no_number_moves_nothing_and_is_counted(
    optimizer: str, tmp_path: Path
) -> None:
    train(tmp_path, max_steps=6, checkpoint_every=1, keep=9, poison=3, max_bad_steps=1, optimizer=optimizer)
    before, after, later = (tensors(tmp_path / "checkpoints" / f"step-{step:08d}") for step in (3, 4, 5))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not all(torch.equal(after[name], later[name]) for name in later)
    rows = steps(tmp_path)
    assert [row["bad_steps"] for row in rows] == [0, 0, 0, 1, 0, 0]
    assert "loss" not in rows[3] and rows[3]["tokens"] == rows[2]["tokens"]


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("zero2", marks=pytest.mark.full)])
def test_ranks_skip_a_bad_step_alike_and_where_none_can_be_skipped_it_ends_the_run(
    strategy: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "max_steps": 5, "poison": 2, "max_bad_steps": 1}
    if strategy == "zero2":
        with pytest.raises(RuntimeError, match="DivergedError: the loss is nan at step 3"):
            run_ranks(outcome, 2, out=str(tmp_path), **settings)
    else:
        run_ranks(outcome, 2, out=str(tmp_path), **settings)
        assert [row["bad_steps"] for row in steps(tmp_path)] == [0, 0, 1, 0, 0]


class Overflow(L.Callback):
    """Stands for an optimizer that overflows on finite gradients: a weight of one rank is infinite after step 3."""

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step == 3 and trainer.global_rank == trainer.world_size - 1:
            fragment = trainer.strategy.fragments()[0]
            fragment.write(torch.full((fragment.numel,), float("inf")))


def overflown(out: str, **settings: Any) -> None:
    train(out, max_steps=6, checkpoint_every=1, callbacks=[Overflow()], **settings)


@pytest.mark.parametrize("strategy", ["single", "ddp", pytest.param("zero3", marks=pytest.mark.full)])
def test_weights_that_are_no_numbers_are_never_saved(strategy: str, tmp_path: Path) -> None:
    ranks = 1 if strategy == "single" else 2
    with pytest.raises(RuntimeError, match="DivergedError: a weight is no number after step 3"):
        run_ranks(overflown, ranks, out=str(tmp_path), strategy=strategy, ranks=ranks)
    kept = saved_checkpoints(tmp_path / "checkpoints")
    assert [folder.name for folder in kept] == ["step-00000001", "step-00000002"]
    files = [file for folder in kept for file in folder.glob("*.safetensors")]
    assert len(files) >= 2 and all(value.isfinite().all() for file in files for value in load_file(file).values())
    assert not (tmp_path / "weights").exists()


BF16 = {"precision": "bf16-mixed", "weights": "bf16"}
SHARDED = ("zero2", "zero3", "zero2_offload", "zero3_offload")


@pytest.mark.parametrize("strategy", QUICK_AND_SLOW)
def test_two_ranks_stop_and_resume_as_if_unbroken(strategy: str, tmp_path: Path) -> None:
    stop_and_go_on(tmp_path, strategy=strategy, clip=0.3)


@pytest.mark.full
@pytest.mark.parametrize("strategy", SHARDED)
def test_ranks_with_weights_in_bf16_stop_and_resume_as_if_unbroken(strategy: str, tmp_path: Path) -> None:
    stop_and_go_on(tmp_path, strategy=strategy, **BF16)


def stop_and_go_on(folder: Path, **settings: Any) -> None:
    """Compare two ranks that stop after three steps and go on with two that do not stop, bit for bit."""
    settings = {"ranks": 2, "ema": 0.9, "max_steps": 5, **settings}
    run_ranks(outcome, 2, out=str(folder / "whole"), **settings)
    run_ranks(outcome, 2, out=str(folder / "broken"), stop_at=3, **settings)
    run_ranks(outcome, 2, out=str(folder / "broken"), **settings)
    assert steps(folder / "whole") == steps(folder / "broken")
    one, other = (torch.load(folder / run / "whole.pt", weights_only=True) for run in ("whole", "broken"))
    assert all(torch.equal(one[name], other[name]) for name in one)


CHANGES = [
    ("zero3", "single"),
    ("single", "zero2"),
    ("zero2", "zero3"),
    ("zero3", "ddp"),
    ("zero2_offload", "zero3_offload"),
    ("zero3_offload", "single"),
    ("single", "zero2_offload"),
]


@pytest.mark.full
@pytest.mark.parametrize(("first", "then"), CHANGES)
def test_a_run_goes_on_under_another_strategy_and_number_of_ranks(first: str, then: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"clip": 0.3, "ema": 0.9, "max_steps": 6}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), **settings)
    for strategy, stop_at in ((first, 3), (then, 0)):
        count = 1 if strategy == "single" else 2
        run_ranks(
            outcome, count, out=str(tmp_path / "two"), strategy=strategy, ranks=count, stop_at=stop_at, **settings
        )
    same_training(tmp_path / "one", tmp_path / "two")


def test_one_rank_that_is_told_to_stop_stops_all(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": "ddp", "ranks": 2, "max_steps": 5, "checkpoint_every": 0}
    with pytest.raises(RuntimeError, match="(?s)rank 0: StoppedError: stopped at step 2 .*rank 1: StoppedError"):
        run_ranks(outcome, 2, out=str(tmp_path), interrupt=1, **settings)
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000002"


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_lightning_launches_the_second_process_and_ctrl_c_leaves_a_run_that_goes_on(
    strategy: str, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": 2, "max_steps": 5, "checkpoint_every": 0}
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}

    def start(out: str, **more: Any) -> subprocess.CompletedProcess[str]:
        arguments = json.dumps({"out": str(tmp_path / out), **settings, **more})
        command = [sys.executable, str(HERE / "tiny_training.py"), arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)

    whole = start("whole")
    assert whole.returncode == 0, whole.stderr
    stopped = start("broken", interrupt=2)
    assert "stopped at step 3 of 5; the same command goes on" in stopped.stderr
    assert start("broken").returncode == 0
    assert steps(tmp_path / "whole") == steps(tmp_path / "broken")
