"""Encoding by several processes, and after being killed: always the same files."""

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

from soratrain.distributed.ranks import deal

SCRIPT = """
import sys, time
from pathlib import Path
import torch
from test_encode import job
from soratrain.errors import UserError
from soratrain.stages.encode import Encode

place, out, pause, fail = Path(sys.argv[1]), sys.argv[2], float(sys.argv[3]), sys.argv[4] == "fail"
original = Encode._encode_shard

def slowly(self, work, number):
    for step in original(self, work, number):
        time.sleep(pause)
        if fail:
            raise UserError("the disk is full")
        yield step

Encode._encode_shard = slowly
torch.set_num_threads(1)
try:
    print(job(place, out=str(place / out), pixels_per_batch=20000)())
except UserError as error:
    sys.exit(f"error: {error}")
"""
SCRIPTS = Scripts(SCRIPT)
start, launched = SCRIPTS.start, SCRIPTS.launched


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file of a finished folder but what tells of it."""
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert json.loads(found.pop("dataset.json"))["complete"]
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards, a VAE, and in `straight` what one undisturbed process makes of them."""
    sys.path.insert(0, str(UNIT))
    from test_encode import write_shards, write_vae

    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder / "shards")
    write_vae(folder / "vae")
    (folder / "shards" / "dataset.json").write_text("{}")
    assert start(folder, "straight").wait(120) == 0
    return folder


def test_units_are_dealt_out_whole_and_evenly_to_any_number_of_ranks() -> None:
    costs = [5, 1, 4, 3, 3, 2, 8]
    for ranks in range(1, 9):
        shares = deal(costs, ranks)
        assert sorted(unit for share in shares for unit in share) == list(range(7))
        loads = [sum(costs[unit] for unit in share) for share in shares]
        assert max(loads) <= sum(costs) / ranks + max(costs)
    assert deal(costs, 2) == [[3, 5, 6], [0, 1, 2, 4]]


def test_two_ranks_make_the_files_of_one(place: Path) -> None:
    for code, _, error in (answers := launched(place, "two")):
        assert code == 0, error[-2000:]
    assert contents(place / "two") == contents(place / "straight")
    assert answers[0][1].splitlines()[-1] == answers[1][1].strip()  # the first one's figures are all ranks'
    assert "'clips': 6" in answers[1][1]
    assert " 3/3 " in answers[0][1]  # of the two shards, the first did one


def test_what_fails_on_one_rank_fails_on_all_and_goes_on_with_one(place: Path) -> None:
    (first, _, said), (second, _, own) = launched(place, "failed", fail=1)
    assert first != 0 and said.endswith("error: rank 1: the disk is full\n")
    assert second != 0 and own.endswith("error: the disk is full\n")
    assert not json.loads((place / "failed" / "dataset.json").read_text())["complete"]
    assert start(place, "failed").wait(120) == 0
    assert contents(place / "failed") == contents(place / "straight")


def test_a_run_that_was_killed_goes_on_to_the_same_files(place: Path) -> None:
    process = start(place, "killed", pause=0.4)
    deadline = time.monotonic() + 60
    while not (place / "killed" / "manifest" / "part-00000.parquet").is_file() and time.monotonic() < deadline:
        time.sleep(0.02)
    while not list((place / "killed").glob(".latents-00001-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert list((place / "killed").glob(".latents-00001-*")), "it was to be killed inside the second shard"
    assert start(place, "killed").wait(120) == 0
    assert contents(place / "killed") == contents(place / "straight")


def test_a_process_whose_starter_has_died_goes_no_further(place: Path) -> None:
    process = start(place, "orphan", SORATRAIN_PARENT=1)
    _, said = process.communicate(timeout=120)
    assert process.returncode != 0 and said.endswith("the same command goes on\n")


@pytest.mark.full
def test_one_command_starts_the_processes_that_a_node_shares(place: Path, tmp_path: Path) -> None:
    words = ["stage=encode", "machine=laptop", "strategy=ddp", "trainer.devices=2", "optimizer=adamw"]
    words += [f"inputs.shards={place / 'shards'}", f"inputs.vae={place / 'vae'}", "machine.precision=32-true"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}

    def call(*more: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "soratrain", *words, *more]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    done = call()
    assert done.returncode == 0, done.stderr[-2000:]
    assert "rank 0 of 2" in done.stdout + done.stderr
    assert call("trainer.devices=1", "run=one").returncode == 0
    folders = [tmp_path / "outputs" / run / "encode" / "base" for run in ("default", "one")]
    names = [sorted(path.name for path in folder.glob("*.tar")) for folder in folders]
    assert names[0] == names[1] and len(names[0]) == 2
    for name in names[0]:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()
    again = call()
    assert again.returncode == 0 and "is done in" in again.stderr
