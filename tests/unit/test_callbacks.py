"""What metrics, progress and loggers promise, without any training."""

from __future__ import annotations

import csv
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from soratrain.amounts import duration, short
from soratrain.callbacks import loggers
from soratrain.callbacks.metrics import Metrics, append_row, captions_shown, read_rows, shown, write_rows
from soratrain.errors import DivergedError, UserError
from soratrain.optim import OptimizerFactory
from soratrain.stages.base import TrainStage


class Unwritable:
    """Stands for a disk that is full halfway."""

    def __str__(self) -> str:
        raise csv.Error("full")


def test_rows_can_gain_columns_and_are_read_as_written(tmp_path: Path) -> None:
    file, rows = tmp_path / "metrics.csv", []
    for row in ({"step": "1", "loss": "2"}, {"step": "2", "loss": "1.5"}, {"step": "3", "loss": "1", "psnr": "20"}):
        rows.append(row)
        append_row(file, rows)
    assert file.read_text().splitlines() == ["step,loss,psnr", "1,2,", "2,1.5,", "3,1,20"]
    assert [row["step"] for row in read_rows(file)] == ["1", "2", "3"]
    assert read_rows(tmp_path / "none.csv") == []


def test_a_row_that_was_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    file.write_text("step,loss\n11,2\n1")
    assert [row["step"] for row in read_rows(file)] == ["11"]


def test_a_row_has_the_share_of_samples_that_each_kind_of_caption_had_and_the_end_says_so_of_the_run() -> None:
    metrics, stage = (
        Metrics(Path("unused.csv"), every=1),
        TrainStage(nets={}, optimizer=OptimizerFactory(), schedule=None, max_steps=1),
    )
    found = (("synthetic", "long"), ("synthetic", "short"), ("original", "gt"), ("synthetic", "odd"), ("", ""))
    for sources, styles in (zip(*found[:3], strict=True), zip(*found[3:], strict=True)):
        stage.report_captions(SimpleNamespace(sources=sources, styles=styles))
        stage.report(samples=len(sources))
    row = metrics.shares({key: float(value) for key, value in stage.take_reported().items()})
    assert row == {
        f"captions_{name}": share
        for name, share in dict(synthetic=0.6, original=0.2, none=0.2, gt=0.2, short=0.2, long=0.2, other=0.2).items()
    }
    rows = [
        {"step": "1", "samples": "30", "captions_synthetic": "0.9", "captions_original": "0.1", "captions_long": "1"}
    ]
    rows += [
        {"step": "2", "samples": "10", "captions_synthetic": "0.5", "captions_original": "0.5", "captions_long": "1"}
    ]
    assert captions_shown(rows) == "captions shown: synthetic 80.0%, original 20.0%; long 100.0%"
    rows = [{**row, "captions_cut": "0.25"} for row in rows]
    assert captions_shown(rows).endswith("; long 100.0%; 25.0% were cut, being longer than is read")
    assert captions_shown([{"step": "1", "samples": "30"}]) == captions_shown([]) == ""


def test_numbers_in_the_csv_tell_any_two_fp32_apart() -> None:
    assert shown(12.0) == "12"
    assert float(shown(0.1234567890123)) == pytest.approx(0.1234567890123, rel=1e-9)


def test_a_loss_that_is_no_number_is_the_users_to_mend() -> None:
    metrics = Metrics(Path("unused.csv"), every=1)
    metrics.step = 7
    for loss in (float("nan"), float("inf")):
        with pytest.raises(DivergedError, match=f"loss is {loss} at step 7"):
            metrics.check({"loss": loss})
    assert issubclass(DivergedError, UserError)
    metrics.check({"loss": 1.0, "grad_norm": 2.0})


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
def test_no_checkpoint_is_written_of_a_step_that_went_wrong(name: str) -> None:
    metrics = Metrics(Path("unused.csv"), every=10)
    metrics.sums, metrics.steps = {"loss": torch.tensor(3.0), "grad_norm": torch.tensor(1.0)}, 2
    metrics.counts = {"loss": 2, "grad_norm": 2}
    assert metrics.state_dict() == {
        "means": {"loss": 1.5, "grad_norm": 0.5}, "steps": 2, "counts": {"loss": 2, "grad_norm": 2}
    }  # fmt: skip
    metrics.sums[name] = torch.tensor(float("nan"))
    with pytest.raises(DivergedError, match="nan at step"):
        metrics.state_dict()


def test_a_figure_that_some_steps_lack_is_the_mean_of_those_that_have_it() -> None:
    metrics = Metrics(Path("unused.csv"), every=10)
    metrics.step = 1
    for loss, players in ((1.0, {}), (2.0, {"d_loss": 0.5}), (None, {"bad_steps": 1.0}), (3.0, {"d_loss": 0.7})):
        stage = TrainStage(nets={}, optimizer=OptimizerFactory(), schedule=None, max_steps=9)
        stage.report(samples=4, **players, **({} if loss is None else {"loss": loss}))
        metrics.on_step(SimpleNamespace(model=None, world_size=2), stage)
    means = metrics.reduced(torch.device("cpu"))
    assert means == pytest.approx({"loss": 2.0, "d_loss": 0.6, "samples": 4.0, "bad_steps": 0.25})
    again = Metrics(Path("unused.csv"), every=10)
    again.load_state_dict(metrics.state_dict())
    assert again.reduced(torch.device("cpu")) == pytest.approx(means)


def test_a_run_that_ends_without_a_loss_says_so_and_how_many_updates_were_skipped_in_all(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("soratrain"), "propagate", True)
    metrics = Metrics(Path("unused.csv"), every=2)
    metrics.rows = [{"step": "2", "loss": "1", "bad_steps": "1"}, {"step": "4", "loss": "", "bad_steps": "2"}]
    metrics.row = {"step": 4.0, "bad_steps": 2.0}
    assert metrics.result() == {"step": 4.0, "bad_steps": 3.0}
    assert "the run ends without a loss: 3 of its updates were skipped, the last ones among them" in caplog.text
    caplog.clear()
    metrics.row["loss"] = 1.0
    assert metrics.result() == {"step": 4.0, "bad_steps": 3.0, "loss": 1.0} and not caplog.text


def test_metrics_that_cannot_be_written_anew_stay_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "metrics.csv"
    write_rows(file, [{"step": "1", "loss": "2"}])
    before = file.read_text()
    with pytest.raises(csv.Error):
        write_rows(file, [{"step": "1"}, {"step": Unwritable()}])  # type: ignore[dict-item]
    assert file.read_text() == before and list(tmp_path.iterdir()) == [file]


def test_rates_and_times_read_well() -> None:
    assert [short(value) for value in (12.34, 1234, 999_900, 5.6e6)] == ["12.3", "1.23k", "1M", "5.6M"]
    assert [duration(value) for value in (0, 75, 3661)] == ["0:00:00", "0:01:15", "1:01:01"]


def test_the_csv_logger_adds_nothing_and_wandb_is_offline_without_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert loggers.csv(out=tmp_path) == []
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (logger,) = loggers.wandb(out=tmp_path, project="p")
    assert logger._offline and logger._wandb_init["dir"] == str(tmp_path)
    (again,) = loggers.wandb(out=tmp_path, project="p")
    assert logger._wandb_init["id"] == again._wandb_init["id"]
