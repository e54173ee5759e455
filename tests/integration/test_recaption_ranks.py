"""Captions by several processes, and after being killed: always the same files."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ranks import UNIT, Scripts

pytestmark = pytest.mark.full
SCRIPT = """
import sys, time
from pathlib import Path
import torch
from test_recaption import recaption
from soratrain.captions.native import NativeEngine
from soratrain.errors import DataError, UserError

place, out, pause, fail = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == "fail"
ask = NativeEngine.ask

def slowly(self, looked, questions):
    time.sleep(pause)
    if fail:
        raise DataError("the disk is full")
    return ask(self, looked, questions)

NativeEngine.ask = slowly
torch.set_num_threads(1)
try:
    print(recaption(place / "shards", place / "captioner", place / out, batch_size=1, attempts=1)())
except UserError as error:
    sys.exit(f"error: {error}")
"""
SCRIPTS = Scripts(SCRIPT)
start, launched = SCRIPTS.start, SCRIPTS.launched


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a finished folder."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(found["captions.json"])["complete"]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a captioner that says something, and in `straight` what one undisturbed process makes."""
    sys.path.insert(0, str(UNIT))
    import data_tiny
    from test_recaption import SHAPES, save_captioner

    folder = tmp_path_factory.mktemp("recaption")
    data_tiny.write_clips(folder / "shards", SHAPES, max_bytes=12_000)
    save_captioner(folder / "captioner", talking=True)
    assert start(folder, "straight").wait(120) == 0
    assert sorted((folder / "straight").glob("captions/*/part-00001.parquet"))
    return folder


def test_two_ranks_make_the_files_of_one(place: Path) -> None:
    for code, _, error in (answers := launched(place, "two")):
        assert code == 0, error[-2000:]
    assert contents(place / "two") == contents(place / "straight")
    assert answers[0][1].splitlines()[-1] == answers[1][1].strip()  # the first one's figures are all ranks'
    assert "'captions': 16" in answers[1][1]


def test_what_fails_on_one_rank_fails_on_all_and_goes_on_with_one(place: Path) -> None:
    (first, _, said), (second, _, own) = launched(place, "failed", fail=1)
    assert first != 0 and said.endswith("error: rank 1: the disk is full\n")
    assert second != 0 and own.endswith("error: the disk is full\n")
    assert not json.loads((place / "failed" / "captions.json").read_text())["complete"]
    assert start(place, "failed").wait(120) == 0
    assert contents(place / "failed") == contents(place / "straight")


def test_a_job_that_is_killed_goes_on_within_a_shard_to_the_same_files(place: Path) -> None:
    process = start(place, "killed", pause=0.3)
    deadline = time.monotonic() + 60
    while not list(place.glob("killed/captions/*/.part-*.jsonl")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (journal,) = place.glob("killed/captions/*/.part-*.jsonl")
    assert journal.read_bytes().count(b"\n") >= 1
    assert start(place, "killed").wait(120) == 0
    assert not journal.exists()
    assert contents(place / "killed") == contents(place / "straight")


def test_one_command_starts_the_processes_that_a_node_shares(place: Path, tmp_path: Path) -> None:
    words = ["stage=recaption", "machine=laptop", "strategy=ddp", "trainer.devices=2", "optimizer=adamw"]
    words += [f"inputs.shards={place / 'shards'}", f"inputs.captioner={place / 'captioner'}"]
    (place / "shards" / "dataset.json").write_text("{}")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "soratrain", *words, "machine.precision=32-true", *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = call()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 of 2" in done.stdout + done.stderr
    assert call("trainer.devices=1", "run=one").returncode == 0
    one, two = (tmp_path / "outputs" / run / "recaption" / "base" / "captions" for run in ("one", "default"))
    files = [path.relative_to(one) for path in sorted(one.rglob("*")) if path.is_file()]
    assert len(files) > 3
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
    again = call()
    assert again.returncode == 0 and "is done in" in again.stderr
