"""A rank that fails or stands still ends the whole run, soon, with its reason, however the ranks were started."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import CONTEXT, free_port, hear, start_server
from tiny_training import main

HERE = Path(__file__).parent
pytestmark = pytest.mark.full
STALL = 0.1  # minutes


def settings_of(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    return {"out": str(out), "strategy": "ddp", "ranks": 2, "max_steps": 8, "checkpoint_every": 2, **settings}


def begun_by(way: str, rank: int, port: int) -> dict[str, str]:
    """Return the environment that a launcher gives a rank."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if way == "torchrun":
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        return {**common, **own, "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test"}
    own = {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    return {**common, **own, "SLURM_JOB_ID": "7", "SLURM_JOB_NAME": "train", "SLURM_NODEID": "0"}


def one_rank(environment: dict[str, str], log: str, settings: dict[str, Any]) -> None:
    """Be one rank, as a launcher would start it."""
    hear()
    torch.set_num_threads(1)
    os.environ.update(environment)
    file = os.open(log, os.O_WRONLY | os.O_CREAT, 0o600)
    os.dup2(file, 2)
    main(settings)


def run(out: Path, way: str, within: float = 300, **settings: Any) -> tuple[list[int], list[str], float]:
    """Return each rank's exit code, what it said, and how many seconds it took until all had ended."""
    start_server()
    port, settings = free_port(), settings_of(out, settings)
    logs = [out / f"rank{rank}" for rank in range(2)]
    ranks = [
        CONTEXT.Process(target=one_rank, args=(begun_by(way, rank, port), str(logs[rank]), settings))
        for rank in range(2)
    ]
    began = time.monotonic()
    for process in ranks:
        process.start()
    try:
        for process in ranks:
            process.join(max(began + within - time.monotonic(), 0.1))
        return [process.exitcode for process in ranks], [log.read_text() for log in logs], time.monotonic() - began
    finally:
        for process in ranks:
            process.kill()


def script(out: Path, **settings: Any) -> subprocess.Popen[str]:
    """Start a run that starts its second process by itself."""
    path = os.pathsep.join(item for item in sys.path if item)
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    words = [sys.executable, str(HERE / "tiny_training.py"), json.dumps(settings_of(out, settings))]
    return subprocess.Popen(words, env=environment, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("strategy", "way", "rank"), [("ddp", "slurm", 0), ("zero2", "torchrun", 0), ("zero3", "slurm", 1)]
)
def test_a_rank_that_raises_ends_all_with_its_traceback_first(
    strategy: str, way: str, rank: int, tmp_path: Path
) -> None:
    codes, said, seconds = run(tmp_path, way, strategy=strategy, fault="raise", fault_rank=rank)
    assert codes == [1, 1] and seconds < 60
    assert said[rank].count("Traceback") == 1 and "TinyError: a mistake in the code" in said[rank]
    line = f"error: rank {rank} failed: TinyError: a mistake in the code; its traceback is above, or in its log"
    assert said[1 - rank].strip().splitlines() == [line]


@pytest.mark.parametrize("strategy", ["ddp", "zero3"])
def test_what_all_ranks_find_at_the_same_step_is_said_once(strategy: str, tmp_path: Path) -> None:
    codes, said, _ = run(tmp_path, "torchrun", strategy=strategy, poison=2)
    assert codes == [2, 2]
    # torch's own warning may stand beside it, where a rank asked the store in the moment in which that went
    told = [re.findall(r"^error: .*|^Traceback.*", each, re.MULTILINE) for each in said]
    assert len(told[0]) == 1 and told[1] == [], said
    assert told[0][0].startswith("error: the loss is nan at step 3; the last checkpoint stands")


def test_where_one_process_starts_the_others_the_traceback_comes_before_what_follows_from_it(tmp_path: Path) -> None:
    process = script(tmp_path, fault="raise")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and said.count("Traceback") == 1
    assert said.index("TinyError: a mistake in the code\n") < said.index("error: rank 1 failed: TinyError")


def test_a_process_that_is_killed_is_named_with_its_signal_by_the_one_that_started_it(tmp_path: Path) -> None:
    process = script(tmp_path, fault="kill")
    said = process.communicate(timeout=300)[1]
    assert process.returncode == 1 and "Traceback" not in said
    assert re.search(
        r"error: rank 1 \(process \d+\) was killed by signal 9 \(SIGKILL\), mostly for want of memory", said
    )


@pytest.mark.parametrize(("way", "rank"), [("slurm", 1), ("torchrun", 0)])
def test_a_rank_that_is_killed_is_missed_by_the_next(way: str, rank: int, tmp_path: Path) -> None:
    codes, said, seconds = run(tmp_path, way, fault="kill", fault_rank=rank)
    assert (codes[rank], codes[1 - rank]) == (-9, 1) and seconds < 60
    assert "Traceback" not in said[1 - rank] and "has gone without a word: killed" in said[1 - rank]
    assert "the same command goes on from the last checkpoint" in said[1 - rank]


@pytest.mark.parametrize(
    ("strategy", "rank", "fault", "phase", "line"),
    [
        ("ddp", 1, {"late": 13}, "data", "in __iter__"),
        ("zero3", 1, {"fault": "sleep"}, "forward/backward", "in training_step"),
        ("ddp", 0, {"fault": "sleep", "fault_rank": 0}, "forward/backward", "in training_step"),
        ("ddp", 1, {"fault": "sleep", "fault_step": 0, "timeout_minutes": 0.3}, "forward/backward", "in training_step"),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_step_phase_and_place(
    strategy: str, rank: int, fault: dict[str, Any], phase: str, line: str, tmp_path: Path
) -> None:
    codes, said, _ = run(tmp_path, "slurm", strategy=strategy, stall_minutes=STALL, **fault)
    assert codes == [1, 1]
    step = fault.get("fault_step", 3) + 1
    for words in said:
        where = f"rank {rank} is behind, at step {step} ({phase}), and the others wait"
        assert where in words and "Traceback" not in words
    assert f"rank {rank} stands here:" in said[rank] and line in said[rank] and "time.sleep(1000)" in said[rank]
    assert "stands here" not in said[1 - rank]


@pytest.mark.parametrize(("way", "rank"), [("slurm", 0), ("torchrun", 1)])
def test_a_rank_that_is_stopped_is_named_and_does_not_stay(way: str, rank: int, tmp_path: Path) -> None:
    codes, said, _ = run(tmp_path, way, stall_minutes=STALL, fault="stop", fault_rank=rank)
    assert (codes[rank], codes[1 - rank]) == (-9, 1)
    assert "is stopped" in said[1 - rank] and "Traceback" not in said[1 - rank]
    assert f"rank {rank}" in said[1 - rank]


def test_one_process_says_where_it_stands_and_is_not_ended(tmp_path: Path) -> None:
    process = script(tmp_path, strategy="single", ranks=1, fault="sleep", fault_rank=0, stall_minutes=0.02)
    try:
        assert process.stderr is not None
        said = ""
        while "suffer" not in said:
            line = process.stderr.readline()
            assert line, said
            said += line
        assert "step 4 (forward/backward) stands here" in said and process.poll() is None
    finally:
        process.kill()
        process.wait()


def test_what_is_slow_but_moves_is_left_alone(tmp_path: Path) -> None:
    # steps of 4.2 s, moves of 0.7 s, a limit of 3 s
    codes, said, seconds = run(tmp_path, "torchrun", stall_minutes=0.05, pause=0.7, per_step=12, max_steps=3)
    assert codes == [0, 0] and said == ["", ""] and seconds > 3 * 6 * 0.7
