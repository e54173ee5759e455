"""Promises of what a process does in a SLURM job, by what SLURM says of it."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from soratrain import slurm, slurm_folder
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import resolve_devices
from soratrain.errors import ConfigError
from soratrain.run import global_rank

IN_JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NAME": "train"}
STEP = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_STEP_NODELIST": "n[3-4]"}


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> pytest.MonkeyPatch:
    """A job without a step, on a machine that has no command of SLURM."""
    for name in [name for name in os.environ if name.startswith(("SLURM", "MASTER"))]:
        monkeypatch.delenv(name)
    for name, value in IN_JOB.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(slurm, "_told", [])
    return monkeypatch


def command(folder: Path, name: str, script: str) -> None:
    """Put a command in the place of one of SLURM's; its words go to `NAME.said`."""
    file = folder / name
    file.write_text(f'#!/bin/sh\necho "$@" >> {folder}/{name}.said\n{script}\n')
    file.chmod(file.stat().st_mode | stat.S_IEXEC)


@pytest.mark.parametrize(
    ("received", "facts", "code", "requeued"),
    [
        (signal.SIGUSR1, "JobState=SIGNALING Reason=None PreemptTime=None", 130, True),
        (signal.SIGTERM, "JobState=RUNNING Reason=None PreemptTime=2026-11-28T17:10:05", 130, True),
        (signal.SIGTERM, "JobState=COMPLETING Reason=TimeLimit PreemptTime=None", 130, True),
        (signal.SIGTERM, "JobState=COMPLETING Reason=None PreemptTime=None", 130, False),  # scancel
        (signal.SIGTERM, "JobState=RUNNING Reason=None PreemptTime=None", 130, False),  # another process has failed
    ],
)
def test_only_pre_emption_and_the_time_limit_start_a_job_again(
    job: pytest.MonkeyPatch, tmp_path: Path, received: int, facts: str, code: int, requeued: bool
) -> None:
    command(tmp_path, "scontrol", f'[ "$1" = show ] && echo "JobId=17 {facts}"; exit 0')
    with pytest.raises(slurm.StoppedJobError) as stopped, slurm.going_on(100, 0):
        slurm._told.append(received)
        raise KeyboardInterrupt
    assert stopped.value.code == code
    assert ("requeue 17" in (tmp_path / "scontrol.said").read_text()) is requeued


def test_a_job_starts_again_as_often_as_it_may_and_the_first_rank_alone_says_so(
    job: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command(tmp_path, "scontrol", "exit 0")
    job.setenv("SLURM_RESTART_COUNT", "3")
    assert slurm.start_again(signal.SIGUSR1, 3) == 130
    assert "requeue" not in (tmp_path / "scontrol.said").read_text()
    with pytest.raises(slurm.StoppedJobError) as stopped, slurm.going_on(100, 1):
        slurm._told.append(signal.SIGUSR1)
        raise KeyboardInterrupt
    assert stopped.value.code == 0 and "requeue" not in (tmp_path / "scontrol.said").read_text()
    assert slurm.start_again(signal.SIGUSR1, 4) == 130
    assert "requeue 17" in (tmp_path / "scontrol.said").read_text()


def test_where_slurm_cannot_be_reached_the_exit_code_asks_the_script(job: pytest.MonkeyPatch) -> None:
    job.setattr(slurm, "ATTEMPTS", 1)
    assert slurm.start_again(signal.SIGUSR2, 100) == slurm.AGAIN == 75


def test_ctrl_c_is_a_persons_and_starts_nothing_again(job: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyboardInterrupt) as stopped, slurm.going_on(100, 0):
        raise KeyboardInterrupt
    assert not isinstance(stopped.value, slurm.StoppedJobError)


def test_a_signal_before_there_is_anything_to_save_stops_at_once(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command(tmp_path, "scontrol", "exit 0")
    before = {number: signal.getsignal(number) for number in slurm.SIGNALS}
    try:
        slurm.listen()
        signal.raise_signal(signal.SIGUSR1)  # while the config is composed: noted
        with pytest.raises(slurm.StoppedJobError), slurm.going_on(100, 0):
            raise AssertionError("it has begun")
        slurm._told.clear()
        with pytest.raises(slurm.StoppedJobError), slurm.going_on(100, 0):
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("it went on")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_job_of_other_processes_than_the_trainers_is_refused_with_both_mends(job: pytest.MonkeyPatch) -> None:
    job.setenv("SLURM_NTASKS", "4")
    with pytest.raises(ConfigError, match="has 4 tasks, and the command was started once, without srun; write: srun"):
        slurm.check_tasks(1, "auto")
    job.setenv("SLURM_NTASKS", "1")
    with pytest.raises(
        ConfigError, match="devices=4 in a SLURM job of one task: ask for --nodes=1 --ntasks-per-node=4"
    ):
        slurm.check_tasks(1, 4)
    slurm.check_tasks(1, 1)
    for name, value in STEP.items():
        job.setenv(name, value)
    slurm.check_tasks(2, 2)
    slurm.check_tasks(2, "auto")
    with pytest.raises(ConfigError, match="give trainer.num_nodes=2 trainer.devices=2, or srun --nodes=1 --ntasks-per"):
        slurm.check_tasks(1, 8)
    with pytest.raises(ConfigError, match="trainer.devices=2 strategy=ddp, or srun --nodes=1 --ntasks-per-node=1$"):
        slurm.check_tasks(1, "auto", single=True)
    job.setenv("SLURM_JOB_NAME", "interactive")
    slurm.check_tasks(1, 8)


def test_where_torchrun_starts_the_processes_of_a_job_it_is_torchrun_that_counts(job: pytest.MonkeyPatch) -> None:
    step = {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2", "SLURM_NTASKS": "2"}
    torchrun = {"TORCHELASTIC_RUN_ID": "1", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8", "GROUP_WORLD_SIZE": "2"}
    for name, value in {**step, **torchrun, "RANK": "11", "LOCAL_RANK": "3", "SLURM_PROCID": "1"}.items():
        job.setenv(name, value)
    job.setattr(os, "cpu_count", lambda: 64)
    assert resolve_devices("auto", StrategyOptions(name="ddp"), "cpu") == 8 and global_rank() == 11
    slurm.check_tasks(2, "auto")
    slurm.check_tasks(2, 8)
    with pytest.raises(
        ConfigError, match="torchrun started 16 processes on 2 nodes; give trainer.num_nodes=2 tr"
    ) as one:
        slurm.check_tasks(1, "auto")
    assert one.value.alike and str(one.value).endswith("or torchrun --nnodes=1 --nproc-per-node=8")
    with pytest.raises(ConfigError, match="trainer.devices=8 strategy=ddp, or torchrun --nnodes=2 --nproc-per-node=1$"):
        slurm.check_tasks(2, "auto", single=True)


def test_ranks_meet_at_the_first_nodes_address_where_its_name_does_not_resolve(
    job: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, value in STEP.items():
        job.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        job.setenv(name, "x")  # so that what is set below is undone
        job.delenv(name)
    with pytest.raises(ConfigError, match="the name of node n3 does not resolve here; set MASTER_ADDR"):
        slurm.meet()
    command(tmp_path, "scontrol", 'echo "NodeName=n3 NodeAddr=10.0.0.3 Port=1"')
    slurm.meet()
    assert os.environ["MASTER_ADDR"] == "10.0.0.3" and os.environ["MASTER_PORT"] == "15017"
    assert (tmp_path / "scontrol.said").read_text() == "show node n3 -o\n"


def test_a_run_that_another_job_works_on_is_refused_and_fresh_starts_over_once(
    job: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    slurm_folder.assign(out, job="16")
    slurm_folder.check_free(out)  # it has ended
    command(tmp_path, "squeue", "echo '16|RUNNING|None|n1'")
    with pytest.raises(ConfigError, match="SLURM job 16 works on it; wait for it, or end it: scancel 16"):
        slurm_folder.check_free(out)
    assert not slurm_folder.begun_before(out)
    slurm_folder.assign(out, job="17")
    slurm_folder.check_free(out)
    slurm_folder.begin(out)
    slurm_folder.assign(out, job="17", log="out")  # by whoever has submitted it, who may come later
    assert not slurm_folder.begun_before(out)  # fresh=true is to be heeded
    job.setenv("SLURM_RESTART_COUNT", "1")
    slurm_folder.begin(out)
    assert slurm_folder.begun_before(out)  # it has been, when the job began


def test_a_task_of_an_array_asks_for_itself_and_not_for_the_array(job: pytest.MonkeyPatch, tmp_path: Path) -> None:
    job.setenv("SLURM_ARRAY_JOB_ID", "17")  # the last task has the array's number
    job.setenv("SLURM_ARRAY_TASK_ID", "3")
    command(tmp_path, "scontrol", '[ "$1" = show ] && echo "JobState=RUNNING PreemptTime=2026-11-28T17:10:05"; exit 0')
    assert slurm.start_again(signal.SIGTERM, 100) == 130
    assert (tmp_path / "scontrol.said").read_text() == "show job 17_3 -o\nrequeue 17_3\n"


def test_a_rank_that_another_process_has_started_in_a_job_is_not_the_batch_scripts(job: pytest.MonkeyPatch) -> None:
    job.delenv("RANK", raising=False)
    job.setenv("SLURM_PROCID", "0")
    job.setenv("LOCAL_RANK", "1")
    assert global_rank() == 1
    job.setenv("SLURM_STEP_ID", "0")
    assert global_rank() == 0


def test_a_signal_to_a_task_alone_reaches_its_command_even_before_that_listens(tmp_path: Path) -> None:
    program, told = tmp_path / "python", tmp_path / "told"
    program.write_text(
        f"#!{sys.executable}\nimport signal, sys, time\ndef told(*_):\n    open({str(told)!r}, 'w').close()\n"
        "    sys.exit(7)\ntime.sleep(1)\nsignal.signal(signal.SIGUSR1, told)\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR1])\ntime.sleep(60)\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IEXEC)
    code = f"import sys; sys.executable = {str(program)!r}\nfrom soratrain.launcher_task import work\n"
    code += f"work([], {str(tmp_path)!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **IN_JOB})
    try:
        end = time.monotonic() + 60
        while not list(tmp_path.glob("logs/*.log")) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGUSR1)
        assert process.wait(60) == 7 and told.exists()
    finally:
        process.kill()
