"""Training on a real SLURM of two nodes: what stops a job on the way leaves no trace in what comes of it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from cluster import Cluster
from runs import LAUNCHED, ROOT, SORATRAIN, TWO_NODES, make_world, rows, same, start, state, submit, until

STEPS = 40  # long enough to be stopped on the way
RUN = [*TWO_NODES, f"machine.steps.vae={STEPS}", "trainer.checkpoint_every=5"]
SCRIPT = f"""#!/bin/bash
#SBATCH --nodes=2 --ntasks-per-node=1 --signal=USR1@60 --requeue --open-mode=append
srun --kill-on-bad-exit=1 --open-mode=append --output=rank-%5t.log {" ".join(SORATRAIN)} {" ".join(RUN)} WORDS
"""

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def folder(slurm: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data."""
    slurm.environment["PYTHONPATH"] = str(ROOT)
    folder = tmp_path_factory.mktemp("runs")
    make_world(slurm, folder)
    (folder / "terminal.txt").touch()
    return folder


@pytest.fixture(scope="module")
def whole(slurm: Cluster, folder: Path) -> Path:
    """A run by a plain script that nothing has stopped."""
    submit(slurm, folder, SCRIPT.replace("WORDS", "run=whole"))
    out = folder / "outputs/whole/vae/base"
    until(lambda: (out / "result.json").is_file(), folder)
    return out


def at_step(out: Path, step: int) -> bool:
    return len(rows(out)) >= step


def test_two_nodes_are_two_ranks_and_each_has_a_log(folder: Path, whole: Path) -> None:
    log, other = ((folder / f"rank-0000{rank}.log").read_text() for rank in (0, 1))
    assert "loss" in log and "Traceback" not in log + other
    assert len(rows(whole)) == STEPS


def test_a_job_that_is_preempted_saves_waits_and_goes_on_bit_for_bit(slurm: Cluster, folder: Path, whole: Path) -> None:
    out = folder / "outputs/moved/vae/base"
    command = start(slurm, folder, *SORATRAIN, "-m", *RUN, "run=moved", *LAUNCHED)
    until(lambda: at_step(out, 4), folder)
    urgent = slurm.run("sbatch", "--partition=urgent", "--exclusive", "--nodes=2", "--wrap=sleep 1", cwd=folder)
    assert urgent.returncode == 0, urgent.stderr
    until(lambda: command.poll() is not None, folder)
    said, log = (folder / "terminal.txt").read_text(), (out / "logs/rank-00000.log").read_text()
    assert command.returncode == 0, said + log
    assert "waits to start again" in said and re.search(r": is done, loss [\d.]+", said), said
    stopped = re.search(r"stopping after step (\d+) \(signal 15\): saving", log)
    assert stopped and 4 <= int(stopped[1]) < STEPS, log
    assert f"going on from step-{int(stopped[1]):08d}" in log and "starts again and goes on (SIGTERM; restart 1)" in log
    assert [len(re.findall("== SLURM job", (out / f"logs/rank-0000{rank}.log").read_text())) for rank in (0, 1)] == [
        2,
        2,
    ]
    same(whole, out, STEPS)


def test_a_script_that_is_told_of_its_time_limit_goes_on_as_often_as_it_may(
    slurm: Cluster, folder: Path, whole: Path
) -> None:
    out = folder / "outputs/limited/vae/base"
    job = submit(slurm, folder, SCRIPT.replace("WORDS", "run=limited requeues=1"))
    for steps, ends in ((3, "PENDING"), (15, "FAILED")):
        until(lambda steps=steps: at_step(out, steps), folder)
        before = len(rows(out))
        assert slurm.run("scancel", "--signal=USR1", job).returncode == 0  # what SLURM itself sends before the limit
        until(lambda ends=ends: state(slurm, job) == ends, folder)
        assert before <= len(rows(out)) < STEPS
    log = (folder / "rank-00000.log").read_text()
    assert f"SLURM job {job} starts again and goes on (SIGUSR1; restart 1)" in log
    assert f"SLURM job {job} has started again 1 times, as often as it may (requeues)" in log
    job = submit(slurm, folder, SCRIPT.replace("WORDS", "run=limited requeues=1"))
    until(lambda: (out / "result.json").is_file(), folder)
    until(lambda: state(slurm, job) == "COMPLETED", folder)
    same(whole, out, STEPS)


@pytest.mark.parametrize("shut_down", [True, False])
def test_a_node_that_dies_costs_the_steps_since_the_last_checkpoint(
    shut_down: bool, slurm: Cluster, folder: Path, whole: Path
) -> None:
    out = folder / f"outputs/died{shut_down}/vae/base"
    words = [*SORATRAIN, "-m", *RUN, f"run=died{shut_down}", *LAUNCHED]
    command = start(slurm, folder, *words)
    until(lambda: at_step(out, 7), folder)
    slurm.kill_node("n2", shut_down=shut_down)
    until(lambda: "n2" in slurm.run("sinfo", "-h", "-t", "down", "-o", "%N").stdout, folder)
    slurm.start_node("n2")
    until(lambda: command.poll() is not None, folder)
    assert command.returncode == 0, (folder / "terminal.txt").read_text()
    assert "going on from step-000000" in (out / "logs/rank-00000.log").read_text()
    same(whole, out, STEPS)


def test_a_job_that_somebody_cancels_stays_away_and_nobody_works_beside_it(slurm: Cluster, folder: Path) -> None:
    out = folder / "outputs/cancelled/vae/base"
    long = [word.replace(f"vae={STEPS}", "vae=2000") for word in RUN]
    command = start(slurm, folder, *SORATRAIN, "-m", *long, "run=cancelled", *LAUNCHED)
    until(lambda: at_step(out, 2), folder)
    job = json.loads((out / "slurm.json").read_text())["job"]
    alone = [*long, "trainer.num_nodes=1", "strategy=single", "run=cancelled"]
    refused = slurm.run(*SORATRAIN, *alone, cwd=folder, timeout=240)
    assert refused.returncode == 2 and f"SLURM job {job} works on it" in refused.stderr
    slurm.run("scancel", job)
    until(lambda: command.poll() is not None, folder)
    said = (folder / "terminal.txt").read_text()
    assert command.returncode == 2 and "error: the run failed" in said and "the same command does what is left" in said
    assert slurm.run("squeue", "-h").stdout == ""
    assert not (out / "result.json").exists() and list((out / "checkpoints").glob("step-*"))
