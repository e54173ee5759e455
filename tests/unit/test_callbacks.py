"""What metrics, progress and loggers promise, without any training."""

from __future__ import annotations

from pathlib import Path

import pytest

from soratrain.callbacks import loggers
from soratrain.callbacks.metrics import DivergedError, Metrics, append_row, read_rows, shown
from soratrain.callbacks.progress import duration, short
from soratrain.errors import UserError


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


def test_numbers_in_the_csv_tell_any_two_fp32_apart() -> None:
    assert shown(12.0) == "12"
    assert float(shown(0.1234567890123)) == pytest.approx(0.1234567890123, rel=1e-9)


def test_a_loss_that_is_no_number_is_the_users_to_mend() -> None:
    metrics = Metrics(Path("unused.csv"), every=1)
    metrics.step = 7
    for loss in (float("nan"), float("inf")):
        with pytest.raises(DivergedError, match=f"loss is {loss} at step 7"):
            metrics.check(loss)
    assert issubclass(DivergedError, UserError)
    metrics.check(1.0)


def test_rates_and_times_read_well() -> None:
    assert [short(value) for value in (12.34, 1234, 5.6e6)] == ["12.3", "1.23k", "5.6M"]
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
