"""What a single-process run promises about its output, beyond resuming."""

from __future__ import annotations

import io
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from rich.console import Console
from safetensors.torch import load_file
from test_strategies import steps
from tiny_training import Data, Net, SGDFactory, Stage, train

from soratrain.callbacks import loggers
from soratrain.callbacks.metrics import read_rows
from soratrain.distributed.checkpoint import saved_checkpoints
from soratrain.distributed.fit import fit
from soratrain.distributed.trainer import build_trainer
from soratrain.optim import OptimizerFactory, Schedule


def test_each_update_is_made_at_the_rate_that_its_row_names(tmp_path: Path) -> None:
    class Slope(Stage):
        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = sum(param.sum() for param in self.net.parameters())  # every gradient is 1
            self.report(loss=loss)
            return loss

    stage = Slope(
        nets={"net": partial(Net)},
        optimizer=SGDFactory(lr=0.5),
        schedule=Schedule(name="wsd", warmup_steps=2, final=0.1, decay=0.5),
        max_steps=6,
    )
    trainer = build_trainer(out=tmp_path, max_steps=6, accelerator="cpu", log_every=1, checkpoint_every=1, keep=9)
    fit(trainer, stage, Data(per_step=1, max_steps=6))
    rates = [row["lr"] for row in steps(tmp_path)]
    assert rates[0] == 0.25 and rates[-1] == pytest.approx(0.05)
    levels = [
        float(load_file(folder / "rank-00000.safetensors")["weight/net.enter.bias"][0])
        for folder in saved_checkpoints(tmp_path / "checkpoints")
    ]
    falls = [before - after for before, after in pairwise(levels)]
    assert falls == pytest.approx(rates[1:], rel=1e-5)


def test_a_row_is_the_mean_of_its_steps_and_the_sum_of_their_counts(tmp_path: Path) -> None:
    train(tmp_path / "each", max_steps=6, log_every=1)
    train(tmp_path / "pairs", max_steps=6, log_every=2)
    each, pairs = steps(tmp_path / "each"), steps(tmp_path / "pairs")
    assert [row["step"] for row in pairs] == [2, 4, 6]
    for row, first, second in zip(pairs, each[::2], each[1::2], strict=True):
        assert row["loss"] == pytest.approx((first["loss"] + second["loss"]) / 2)
        assert row["tokens"] == first["tokens"] + second["tokens"]


def test_the_last_steps_get_a_row_even_where_they_do_not_fill_one(tmp_path: Path) -> None:
    _, _, last = train(tmp_path, max_steps=5, log_every=3)
    assert [row["step"] for row in steps(tmp_path)] == [3, 5]
    assert last["step"] == 5 and last["loss"] == pytest.approx(steps(tmp_path)[-1]["loss"])


def test_the_same_seed_repeats_the_losses_exactly(tmp_path: Path) -> None:
    train(tmp_path / "one", max_steps=4, optimizer="muon")
    train(tmp_path / "two", max_steps=4, optimizer="muon")
    assert steps(tmp_path / "one") == steps(tmp_path / "two")


def test_averaged_weights_are_exported_and_finalized_and_training_weights_are_kept(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}

    class Finalizing(Stage):
        def finalize(self) -> None:
            seen["bias"] = self.net.enter.bias.detach().clone()
            seen["training"] = self.net.training
            self.net.scale.fill_(3.0)

    trainer, stage = build_with(Finalizing, tmp_path, ema=0.5)
    fit(trainer, stage, Data(per_step=1, max_steps=4))
    exported = load_file(tmp_path / "weights" / "net.safetensors")
    kept = load_file(tmp_path / "checkpoints" / "step-00000004" / "rank-00000.safetensors")
    assert torch.equal(exported["enter.bias"], seen["bias"])
    assert torch.equal(exported["enter.bias"], kept["average/net.enter.bias"])
    assert not torch.equal(exported["enter.bias"], kept["weight/net.enter.bias"])
    assert torch.equal(stage.net.enter.bias.detach(), kept["weight/net.enter.bias"])
    assert (exported["scale"] == 3.0).all() and seen["training"] is False
    document = yaml.safe_load((tmp_path / "weights" / "net.yaml").read_text())
    assert document["extra"]["step"] == 4 and document["kwargs"] == {"width": 10}


def build_with(cls: type[Stage], out: Path, **settings: Any) -> tuple[Any, Stage]:
    stage = cls(
        nets={"net": partial(Net, width=10)}, optimizer=OptimizerFactory(lr=0.1), schedule=Schedule(), max_steps=4
    )
    return build_trainer(out=out, max_steps=4, accelerator="cpu", log_every=1, **settings), stage


def test_a_terminal_gets_a_bar_with_steps_loss_and_speed_and_a_log_gets_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    shown = io.StringIO()
    terminal = partial(Console, file=shown, force_terminal=True, width=120)
    monkeypatch.setattr("soratrain.callbacks.progress.Console", lambda stderr: terminal())
    train(tmp_path / "bar", max_steps=4)
    assert "4/4" in shown.getvalue() and "loss" in shown.getvalue() and "tokens/s" in shown.getvalue()
    monkeypatch.setattr("soratrain.callbacks.progress.Console", lambda stderr: Console(file=io.StringIO()))
    with caplog.at_level("INFO", logger="soratrain"):
        train(tmp_path / "line", max_steps=4)
    assert "training 4/4  100 %  loss" in caplog.text and "left 0:00:00" in caplog.text


@pytest.mark.full
def test_wandb_writes_offline_into_the_output_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    trainer, stage = build_with(Stage, tmp_path, logger=partial(loggers.wandb, project="test"))
    fit(trainer, stage, Data(per_step=1, max_steps=4))
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert [row["step"] for row in read_rows(tmp_path / "metrics.csv")] == ["1", "2", "3", "4"]
