"""Promises of hydra/launcher=slurm, by what SLURM says of jobs: what is cancelled, asked again and started again."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

from soratrain import launcher, outputs, slurm, slurm_folder
from soratrain.compose import launcher_node
from soratrain.errors import ConfigError, DataError
from soratrain.launcher import SlurmLauncher
from soratrain.launcher_options import teardown
from soratrain.launcher_task import HEAD, why
from soratrain.sweep import Run


def command(folder: Path, name: str, script: str) -> None:
    """Put a command in the place of one of SLURM's; its words go to `NAME.said`."""
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.said\n{script}\n')
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


def says(folder: Path, name: str, *answers: str) -> None:
    """Let a command say one answer after another, the last one again and again."""
    for number, answer in enumerate(answers):
        (folder / f"{name}.{number}").write_text(answer)
    count = f"n=$(($(wc -l < {folder}/{name}.said) - 1)); [ $n -lt {len(answers)} ] || n={len(answers) - 1}"
    command(folder, name, f"{count}\ncat {folder}/{name}.$n")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose commands come before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(launcher, "POLLS", (0.01, 0.01, 60.0))
    for name in ("scancel", "scontrol"):
        command(tmp_path, name, "exit 0")
    return tmp_path


def watched(place: Path, *, own: bool) -> None:
    """Wait for the job 17, which this command has submitted, or another one."""
    found = SlurmLauncher(submitit_folder=str(place))
    found.unproved = {"17"} if own else set()
    found.watch({"17": Run((), place / "run", ("seed=1",), False)})


WAITS, RUNS = "17|PENDING|PartitionNodeLimit|\n", "17|RUNNING|None|n[1-2]\n"


def test_a_new_job_that_slurm_would_never_start_is_cancelled(place: Path) -> None:
    says(place, "squeue", WAITS)
    with pytest.raises(ConfigError, match=r"it would never start job 17 \(PartitionNodeLimit\), which is cancelled"):
        watched(place, own=True)
    assert (place / "scancel.said").read_text() == "17\n"


@pytest.mark.parametrize(
    ("own", "restarts", "answers"),
    [(False, 0, [WAITS, ""]), (True, 1, [WAITS, ""]), (True, 0, [RUNS, "17|PENDING|BeginTime|\n", WAITS, ""])],
)
def test_one_that_another_has_submitted_or_that_has_run_waits_for_its_nodes_to_come_back(
    own: bool, restarts: int, answers: list[str], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    says(place, "squeue", *answers)
    command(place, "scontrol", f"echo JobId=17 Restarts={restarts}")
    watched(place, own=own)
    assert not (place / "scancel.said").exists()
    assert "17: waits (PartitionNodeLimit)" in capsys.readouterr().err


def test_a_queue_that_does_not_answer_is_asked_again_and_is_no_end_of_a_job(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slurm, "ATTEMPTS", 2)
    monkeypatch.setattr(slurm.time, "sleep", lambda seconds: None)
    command(place, "squeue", "echo 'Unable to contact slurm controller' >&2; exit 1")
    with pytest.raises(DataError, match="squeue does not say whether SLURM job 17 still waits or runs; give the same"):
        slurm.alive("17")
    command(place, "squeue", f"[ $(wc -l < {place}/squeue.said) -gt 3 ] && echo '{RUNS.strip()}'")
    assert slurm.alive("17")
    command(place, "squeue", "echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1")
    assert not slurm.alive("17")
    says(place, "squeue", "17_4|RUNNING|None|n1\n")
    assert slurm.alive("17_4") and not slurm.alive("17_3")


def test_nothing_is_submitted_whose_folder_cannot_be_written_to(place: Path) -> None:
    command(place, "sbatch", "exit 1")
    (place / "file").touch()
    run = Run((), place / "file" / "run", ("seed=1",), False)
    with pytest.raises(DataError, match=r"file/run: cannot be written \(Not a directory\); give run=NAME"):
        SlurmLauncher(submitit_folder=str(place / "jobs")).submit([run])
    assert not (place / "sbatch.said").exists()


def test_looking_whether_a_folder_can_be_written_to_leaves_nothing(tmp_path: Path) -> None:
    outputs.check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("code", "answering", "state", "restarts", "ends", "requeued"),
    [
        (1, ["n1"], "RUNNING", "", 75, True),  # the other is gone
        (137, ["n2"], "RUNNING", "2", 75, True),
        (1, ["n1"], "RUNNING", "3", 1, False),  # as often as it may
        (1, ["n1", "n2"], "RUNNING", "", 1, False),  # a mistake in the code
        (1, [], "RUNNING", "", 1, False),  # nobody can be asked
        (1, ["n1"], "CANCELLED", "", 1, False),
        (143, ["n1", "n2"], "RUNNING", "1", 75, True),  # by an order that was meant for the start before
        (143, ["n1", "n2"], "RUNNING", "", 143, False),  # there is none before
        (143, ["n1", "n2"], "RUNNING", "2", 143, False),  # the start before ended so already
        (143, ["n1", "n2"], "CANCELLED", "1", 143, False),
        (2, ["n1"], "RUNNING", "", 2, False),  # the user can mend it
        (0, ["n1"], "RUNNING", "", 0, False),
        (75, ["n1", "n2"], "RUNNING", "2", 75, True),  # its process wants to and cannot say so
        (75, ["n1", "n2"], "RUNNING", "3", 75, False),  # nor does it know how often it has
    ],
)
def test_a_job_that_has_failed_starts_again_where_some_of_its_nodes_answer_no_more(
    code: int, answering: list[str], state: str, restarts: str, ends: int, requeued: bool, place: Path
) -> None:
    command(
        place, "srun", f'case "$*" in {"|".join(f"*={name}?true" for name in answering) or "none"}) ;; *) exit 1; esac'
    )
    command(
        place,
        "scontrol",
        f'case "$1 $2" in "show hostnames") printf "n1\\nn2\\n";; show*) echo "JobState={state} StdOut={place}/log";;'
        " esac",
    )
    environment = {**os.environ, "SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}
    environment["SLURM_RESTART_COUNT"] = restarts
    (place / "log").write_text("exit code 143 of start 2\n")
    environment.pop("SLURM_ARRAY_TASK_ID", None)
    script = "\n".join([f"(exit {code})", *teardown(requeues=3)])
    done = subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == ends, done.stderr
    said = (place / "scontrol.said").read_text() if (place / "scontrol.said").exists() else ""
    assert ("requeue 17" in said) is requeued
    assert ("has started again 3 times, as often as it may" in done.stdout) is (restarts == "3")
    assert (place / "srun.said").exists() is (code in (1, 137) or (code == 143 and restarts != "1"))


@pytest.mark.parametrize(
    ("began", "ended", "by_script"),
    [
        ("17, start 1", 2, True),  # the second start has not come to say anything
        ("17, start 1", 1, False),
        ("17, start 2", 1, False),  # the script is silent about ends that need no word
        ("16, start 2", 2, True),  # another job's
    ],
)
def test_why_a_job_ended_is_what_its_last_start_said_not_the_one_before(
    began: str, ended: int, by_script: bool, tmp_path: Path
) -> None:
    log, script = tmp_path / "logs" / "rank-00000.log", tmp_path / "17_0_log.out"
    log.parent.mkdir()
    log.write_text(f"\n{HEAD} {began}, rank 0 of 2 on n1\nit is at step 7\n")
    script.write_text(f"srun: error: n2: task 1: Terminated\nexit code 143 of start {ended}\n")
    slurm_folder.assign(tmp_path, job="17", log=str(script))
    said = f"srun: error: n2: task 1: Terminated ({script})" if by_script else f"it is at step 7 ({log})"
    assert why(tmp_path) == said


def test_a_job_is_told_how_often_it_may_start_again_and_one_that_never_may_tells_slurm(place: Path) -> None:
    command(place, "sbatch", f"cp $1 {place}/script; echo Submitted batch job 17")
    for requeues, said, limit in ((7, "--requeue", "-le 7 ]"), (0, "--no-requeue", "-le 0 ]")):
        node = launcher_node(["stage=dit", "trainer.devices=1", f"requeues={requeues}", "hydra/launcher=slurm"])
        made = SlurmLauncher(**{**node, "submitit_folder": str(place / "jobs")})
        made.submit([Run((), place / f"run{requeues}", ("seed=1",), False)])
        script = (place / "script").read_text()
        assert f"#SBATCH {said}\n" in script and limit in script
