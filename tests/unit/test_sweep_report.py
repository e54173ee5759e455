"""Promises of stage=sweep_report: every run of a sweep is told, as what it is."""

from __future__ import annotations

import csv
import json
import os
import socket
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from soratrain.__main__ import dispatch
from soratrain.chart import Scale, short
from soratrain.errors import DataError
from soratrain.launcher import told
from soratrain.stages.sweep_report import SweepReport
from soratrain.sweep import Run, metric_of
from soratrain.sweep_runs import compared, diverged, figure, outcomes, record, swept


def make(root: Path, name: str, overrides: list[str], *, loss: float | None = None, here: bool = False) -> Path:
    """Make what a run of a sweep leaves behind; without a `loss` it is not done."""
    out = root / name
    out.mkdir(parents=True)
    record(out, ["stage=dit", *overrides], here=here)
    (out / "config.yaml").write_text(yaml.safe_dump({"trainer": {"max_steps": 40}}))
    rows = [f"{step},{(loss or 2) + 1 / step},{step}" for step in (10, 20, 30)]
    (out / "metrics.csv").write_text("\n".join(["step,loss,seconds", *rows]) + "\n")
    if loss is not None:
        (out / "result.json").write_text(json.dumps({"loss": loss, "val_loss": loss / 2, "seconds": 9, "stage": "dit"}))
    return out


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep of six runs, each in another state."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    root = Path("outputs/default/dit/sweep")
    make(root, "aa", ["optimizer.lr=1e-3", "seed=1"], loss=0.5)
    make(root, "bb", ["optimizer.lr=1e-4", "seed=1"], loss=0.4)
    failed = make(root, "cc", ["optimizer.lr=1e-1", "seed=1"])
    (failed / "log.txt").write_text("2026 INFO going\nerror: the loss is nan at step 30; lower optimizer.lr\n")
    make(root, "dd", ["optimizer.lr=1e-2", "seed=1"], here=True)  # this process works on it
    gone = make(root, "ee", ["optimizer.lr=1e-2", "seed=2"], here=True)
    known = json.loads((gone / "sweep.json").read_text())
    (gone / "sweep.json").write_text(json.dumps(known | {"pid": 2**22 + 1}))
    waiting = make(root, "ff", ["optimizer.lr=1e-2", "seed=3"])
    (waiting / "metrics.csv").unlink()
    (waiting / "slurm.json").write_text('{"job": "7_1"}')
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\necho '7_1|PENDING|Priority|'\n")
    squeue.chmod(0o755)
    return root


def test_every_run_is_told_as_what_it_is(root: Path) -> None:
    found = {run.folder.name: (run.state, run.note) for run in outcomes(root)}
    assert found == {
        "aa": ("done", ""),
        "bb": ("done", ""),
        "cc": ("failed", "step 30 of 40: the loss is nan at step 30; lower optimizer.lr"),
        "dd": ("running", "step 30 of 40"),
        "ee": ("unfinished", "step 30 of 40"),
        "ff": ("waiting", "no step yet, SLURM job 7_1"),
    }


def test_a_run_that_ends_without_a_loss_has_diverged_and_is_compared_by_nothing_else(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lost = {"step": 40, "samples": 35.0, "bad_steps": 9.0, "seconds": 9, "stage": "dit"}
    (root / "aa/result.json").write_text(json.dumps(lost))
    assert np.isnan(metric_of(root / "aa")) and metric_of(root / "bb") == 0.2
    note = "no loss: 9 updates were skipped, the last ones among them"
    assert told(Run((), root / "aa", (), False)) == f"is done, but has {note}"
    assert told(Run((), root / "bb", (), False)) == "is done, val_loss 0.2"
    assert {(run.state, run.note) for run in outcomes(root) if run.folder.name == "aa"} == {("diverged", note)}
    assert dispatch(["stage=sweep_report", "machine=laptop"]) == 0
    assert "6 runs: 1 done, 1 diverged, 1 running" in capsys.readouterr().out
    (root / "bb/result.json").write_text(json.dumps(lost))
    assert figure(outcomes(root), None) == "loss"  # not the samples, of which both have some


def test_a_job_that_trains_nothing_is_compared_by_how_fast_it_was_or_by_what_it_made() -> None:
    assert compared({"clips_per_s": 3.0, "samples": 8}) == ("clips_per_s", 3.0)
    assert compared({"samples": 8}) == ("samples", 8.0) and not diverged({"samples": 8})


def test_a_process_that_got_the_number_of_one_that_is_gone_does_not_work_on_its_run(root: Path) -> None:
    known = json.loads((root / "dd/sweep.json").read_text())
    assert (known["pid"], known["host"]) == (os.getpid(), socket.gethostname())
    (root / "dd/sweep.json").write_text(json.dumps(known | {"begun": "1"}))
    assert {run.state for run in outcomes(root) if run.folder.name == "dd"} == {"unfinished"}


def test_an_error_that_a_run_has_gone_on_after_is_not_why_it_ended(root: Path) -> None:
    log, rank = root / "cc/log.txt", root / "cc/logs/rank-00000.log"
    rank.parent.mkdir()
    rank.write_text("error: of long ago\n")
    os.utime(rank, (1, 1))
    log.write_text(log.read_text() + "2026 INFO going on from step-00000030\n")
    record(root / "cc", ["stage=dit"], here=True, code=-9)
    (note,) = {run.note for run in outcomes(root) if run.folder.name == "cc"}
    assert note == "step 30 of 40: was killed by signal 9 (SIGKILL), mostly for want of memory"
    rank.write_text("error: of the first start\n== SLURM job 7, start 2\nerror: rank 1 failed\n")
    (note,) = {run.note for run in outcomes(root) if run.folder.name == "cc"}
    assert note == "step 30 of 40: rank 1 failed"


def test_a_job_of_which_slurm_says_nothing_is_not_called_running_or_failed(root: Path, tmp_path: Path) -> None:
    (tmp_path / "squeue").write_text("#!/bin/sh\nexit 1\n")
    (note,) = {(run.state, run.note) for run in outcomes(root) if run.folder.name == "ff"}
    assert note == ("unfinished", "no step yet, SLURM job 7_1, of which squeue says nothing now")


def test_a_run_that_ended_before_it_could_write_a_reason_has_failed_too(root: Path) -> None:
    record(root / "ee", ["stage=dit", "seed=2"], here=True, code=2)
    assert {run.note for run in outcomes(root) if run.folder.name == "ee"} == {"step 30 of 40: ended with exit code 2"}


def test_what_was_swept_over_is_what_differs(root: Path) -> None:
    assert swept(outcomes(root)) == ["optimizer.lr", "seed"]
    assert swept([run for run in outcomes(root) if run.folder.name in "aabb"]) == ["optimizer.lr"]


def test_the_report_is_a_table_a_csv_and_a_picture_best_first(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert dispatch(["stage=sweep_report", "machine=laptop"]) == 0
    said = capsys.readouterr().out
    counts = "6 runs: 2 done, 1 running, 1 waiting, 1 unfinished, 1 failed; least val_loss: 0.2 in bb"
    assert counts in said and said.index("bb") < said.index("aa") < said.index("cc")
    rows = list(csv.DictReader(Path("outputs/default/sweep_report/base/dit.csv").read_text().splitlines()))
    assert [row["run"] for row in rows] == ["bb", "aa", "cc", "dd", "ee", "ff"]
    assert [(row["optimizer.lr"], row["val_loss"], row["state"]) for row in rows[:2]] == [
        ("1e-4", "0.2", "done"),
        ("1e-3", "0.25", "done"),
    ]
    picture = np.asarray(Image.open("outputs/default/sweep_report/base/dit.png"))
    assert picture.shape[1] == 2560 and picture.std() > 10


def test_two_numbers_make_a_heat_map_in_which_each_cell_has_its_own_colour(tmp_path: Path) -> None:
    root = tmp_path / "outputs/r/dit/sweep"
    for place, (lr, decay) in enumerate([("1e-4", "0.1"), ("1e-4", "0.2"), ("1e-3", "0.1"), ("1e-3", "0.2")]):
        make(root, f"run{place}", [f"optimizer.lr={lr}", f"optimizer.weight_decay={decay}"], loss=1.0 + place)
    SweepReport(out=tmp_path / "report", run="r", folder=str(root))()
    picture = np.asarray(Image.open(tmp_path / "report/dit.png"))[200:900, 200:1250]
    colours, counts = np.unique(picture.reshape(-1, 3), axis=0, return_counts=True)
    assert (counts > 20_000).sum() == 5  # four cells and the ground


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "outputs/default: holds no sweep; make one: python -m soratrain -m stage=dit run=default KEY=A,B"),
        (["stage.job.folder=empty"], "empty: holds no run of a sweep; make some"),
        (["stage.job.folder=nowhere"], "nowhere: no such folder"),
    ],
)
def test_where_there_is_no_sweep_it_says_how_to_make_one(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=said):
        dispatch(["stage=sweep_report", "machine=laptop", *words])


def test_a_figure_that_no_run_reports_is_named_with_those_there_are(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="metric=fid: no run reports it; there are: loss, seconds, step, val_loss"):
        SweepReport(out=tmp_path, run="default", metric="fid")()


@pytest.mark.parametrize(
    ("values", "ticks"),
    [([0.0, 10.0], [0, 2, 4, 6, 8, 10]), ([1e-4, 1e-2], [1e-4, 1e-3, 1e-2]), ([0.31, 0.39], [0.32, 0.34, 0.36, 0.38])],
)
def test_ticks_are_round_and_lie_within_the_scale(values: list[float], ticks: list[float]) -> None:
    scale = Scale.around(values)
    found = scale.ticks()
    assert set(ticks) <= {round(tick, 12) for tick in found}
    assert all(0 <= scale.place(tick) <= 1 for tick in found) and len(found) <= 7
    assert scale.place(values[0]) < scale.place(values[1])


def test_numbers_are_short() -> None:
    assert [short(value) for value in (0, 0.5, 1e-3, 3.5e-5, 123456)] == ["0", "0.5", "1e-3", "3.5e-5", "1.23e5"]


def test_a_sweep_that_was_widened_by_another_key_is_drawn_and_nothing_is_read_as_markup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    root = Path("outputs/default/dit/sweep")
    for number, (rate, depth) in enumerate([("1e-3", ""), ("1e-4", ""), ("1e-3", "4"), ("1e-4", "2")]):
        words = [f"optimizer.lr={rate}", "inputs.shards=[data/a,data/b]", *([f"dit.depth={depth}"] if depth else [])]
        make(root, f"r{number}", [*words, f"seed={number}"], loss=0.5 + number)
    failed = make(root, "bad", ["optimizer.lr=1e-2", "inputs.shards=[/data/x]"])
    (failed / "log.txt").write_text("error: [/data/x] is not there\n")
    SweepReport(out=tmp_path / "report", run="default", folder=str(root))()
    said = capsys.readouterr().out
    assert "[/data/x] is not there" in said and "[data/a,data/b]" in said
    assert (tmp_path / "report" / "dit.png").is_file()
