"""Inside a SLURM job: which processes there are, where they meet, and how the job goes on after it had to stop.

That a job which is told to stop is to start again, the process of the first rank decides, here, once all ranks have
stopped at the same step and the checkpoint is whole; of a job whose node is gone or came
back just now, its script (launcher_options.py). Both count to `requeues`. Lightning's own requeueing is off, and so is
submitit's.

SLURM sends the signal that was asked for before the time limit (`--signal=USR1@90`), and SIGTERM at pre-emption, at
the limit itself, when somebody cancels the job and when another of its processes has failed. Only the first two, and a
limit that was not announced, are reasons to start again; which of them it was, SLURM itself is asked.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from soratrain import again
from soratrain.amounts import counted
from soratrain.errors import ConfigError, DataError, on_all_ranks

log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
INTERACTIVE = (
    "bash",
    "interactive",
)  # names of jobs in which a person types; Lightning ignores SLURM there, and so here
ASKED = 60.0  # seconds that a command of SLURM may take
ATTEMPTS = 5  # to start again, or to ask whether a job has ended, a second apart
AGAIN = 75  # exit code: it wants to start again and cannot say so itself (sysexits.h, EX_TEMPFAIL); the script may

_told: list[int] = []  # the signals that came while this module listened
_listener = 0  # the process that listens; SLURM's signals reach those that it starts as well
_begun = False  # whether a signal may interrupt: something is there that would start again


class StoppedJobError(KeyboardInterrupt):
    """The job was told to stop; `code` is this process's exit code."""

    def __init__(self, code: int) -> None:
        super().__init__()
        self.code = code


def number(name: str) -> int | None:
    """Return an environment variable that is a number."""
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else None


def in_job() -> bool:
    """Return whether this process belongs to a SLURM job in which nobody types."""
    return "SLURM_JOB_ID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in INTERACTIVE


def in_step() -> bool:
    """Return whether srun started this process."""
    return in_job() and "SLURM_STEP_ID" in os.environ


def job_id() -> str:
    """Return the job's number as SLURM shows it, `array_task` for a task of an array."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ["SLURM_JOB_ID"]


def restarts() -> int:
    """Return how often SLURM has started this job again."""
    return number("SLURM_RESTART_COUNT") or 0


def torchrun() -> bool:
    """Return whether torchrun has started this process: then it is who counts, also where srun has started it."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def tasks_per_node() -> int | None:
    """Return how many processes torchrun or srun has started on each node; None outside of both."""
    if torchrun():
        return number("LOCAL_WORLD_SIZE")
    if not in_step():
        return None
    return (number("SLURM_STEP_NUM_TASKS") or 1) // (number("SLURM_STEP_NUM_NODES") or 1)


def check_tasks(nodes: int, devices: int | str, *, single: bool = False) -> None:
    """Refuse a job whose processes are not those that the trainer expects, who would wait for each other for ever.

    Args:
        single: the strategy is for one process.

    Raises:
        ConfigError: says which keys, or which words of srun, would fit.
    """
    if torchrun():
        check_torchrun(nodes, devices, single=single)
        return
    if not in_job():
        return
    if not in_step():
        if (asked := number("SLURM_NTASKS") or 1) > 1:
            raise ConfigError(
                f"this SLURM job has {asked} tasks, and the command was started once, without srun; write: srun python"
                " -m soratrain …"
            )
        if "SLURM_NTASKS" in os.environ and devices != "auto" and nodes * int(devices) > 1:
            raise ConfigError(
                f"trainer.num_nodes={nodes} trainer.devices={devices} in a SLURM job of one task: ask for"
                f" --nodes={nodes} --ntasks-per-node={devices}, and write: srun python -m soratrain …"
            )
        return
    tasks, on = number("SLURM_STEP_NUM_TASKS") or 1, number("SLURM_STEP_NUM_NODES") or 1
    each = devices if devices != "auto" else 1 if single else tasks_per_node()
    if (tasks, on) != (nodes * int(each or 1), nodes):
        strategy = " strategy=ddp" if single else ""
        raise ConfigError(
            f"trainer.num_nodes={nodes} trainer.devices={devices}: srun started {counted(tasks, 'tasks')} on"
            f" {counted(on, 'nodes')}; give trainer.num_nodes={on} trainer.devices={tasks // on}{strategy}, or srun"
            f" --nodes={nodes} --ntasks-per-node={each}"
        )


def check_torchrun(nodes: int, devices: int | str, *, single: bool) -> None:
    """Refuse other processes of torchrun than those that the trainer expects.

    Raises:
        ConfigError: says which keys, or which words of torchrun, would fit.
    """
    ranks, here = number("WORLD_SIZE") or 1, number("LOCAL_WORLD_SIZE") or 1
    on = number("GROUP_WORLD_SIZE") or max(1, ranks // here)
    each = devices if devices != "auto" else 1 if single else here
    if (ranks, on) != (nodes * int(each), nodes):
        strategy = " strategy=ddp" if single else ""
        raise on_all_ranks(
            ConfigError(
                f"trainer.num_nodes={nodes} trainer.devices={devices}: torchrun started {ranks}"
                f" process{'es' * (ranks > 1)} on {counted(on, 'nodes')}; give trainer.num_nodes={on}"
                f" trainer.devices={here}{strategy}, or torchrun --nnodes={nodes} --nproc-per-node={each}"
            )
        )


def meet() -> None:
    """Say where the ranks find each other: MASTER_ADDR and MASTER_PORT, unless they are set.

    The address is that of the step's first node, by its name or, where names do not resolve, as SLURM knows it.

    Raises:
        ConfigError: it cannot be found out.
    """
    if not in_step():
        return
    if number("SLURM_STEP_NUM_TASKS") == 1:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_ADDR" not in os.environ:
        from lightning.fabric.plugins.environments import SLURMEnvironment

        first = SLURMEnvironment.resolve_root_node_address(os.environ["SLURM_STEP_NODELIST"])
        os.environ["MASTER_ADDR"] = address_of(first)
    job = int(os.environ["SLURM_JOB_ID"]) + 1009 * (number("SLURM_STEP_ID") or 0)
    os.environ.setdefault("MASTER_PORT", str(15_000 + job % 10_000))  # another for each job and step of a node


def address_of(node: str) -> str:
    """Return a name or an address under which a node is reached.

    Raises:
        ConfigError: there is none.
    """
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        told = facts("node", node).get("NodeAddr")
        if told and told != node:
            return told
    raise ConfigError(f"MASTER_ADDR: the name of node {node} does not resolve here; set MASTER_ADDR to its address")


def facts(kind: str, name: str) -> dict[str, str]:
    """Return what `scontrol show` says of a job or node, by key; nothing where it says nothing."""
    said = ask("scontrol", "show", kind, name, "-o")
    return dict(word.split("=", 1) for word in (said or "").split() if "=" in word)


def ask(*words: str) -> str | None:
    """Return what a command of SLURM prints; None where it is not here or fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=ASKED, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


@dataclass(frozen=True)
class Queued:
    """A job that waits or runs: its number, state, why it waits and where it runs, in SLURM's words."""

    job: str
    state: str
    reason: str
    nodes: str


def queued(jobs: Sequence[str]) -> list[Queued] | None:
    """Return those of some jobs that wait or run: none where there is no squeue; None where SLURM does not answer."""
    numbers = ",".join(sorted({job.split("_")[0] for job in jobs}))
    words = ["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={numbers}"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=ASKED, check=False)
    except FileNotFoundError:
        return []
    except (OSError, subprocess.TimeoutExpired):
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:  # that is what it says of those long gone
        return None
    found = [Queued(*line.strip().split("|")) for line in answer.stdout.splitlines() if line.count("|") == 3]
    return [item for item in found if item.job in jobs]


def alive(job: str) -> bool:
    """Return whether a job waits or runs.

    Raises:
        DataError: SLURM does not say.
    """
    for attempt in range(ATTEMPTS):
        time.sleep(min(attempt, 1))
        if (found := queued([job])) is not None:
            return bool(found)
    raise DataError(
        f"squeue does not say whether SLURM job {job} still waits or runs; give the same command again when it does"
    )


def listen() -> None:
    """Take note of SLURM's signals from now on, whose usual effect is the end of a process."""
    global _listener
    if in_job():
        _listener = os.getpid()
        for known in SIGNALS:
            signal.signal(known, _heard)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # whoever started this one may have held them back


def _heard(received: int, frame: FrameType | None) -> None:
    _told.append(received)
    if _begun and len(_told) == 1 and os.getpid() == _listener:  # schedulers repeat themselves
        raise KeyboardInterrupt


@contextmanager
def going_on(requeues: int, rank: int) -> Iterator[None]:
    """See that the job starts again where SLURM stops what is done in the context; all can go on with the same command.

    Raises:
        StoppedJobError: it was stopped.
    """
    global _begun
    if not in_job():
        yield
        return
    _begun = True
    try:
        if _told:
            raise KeyboardInterrupt
        yield
    except KeyboardInterrupt as stopped:
        received = getattr(stopped, "received", 0) or next(iter(_told), 0)
        _told.append(received)
        if received not in SIGNALS:
            raise
        # the first rank speaks for all; that another one ends well keeps srun from ending the first before it has
        raise StoppedJobError(start_again(received, requeues) if rank == 0 else 0) from stopped
    finally:
        _begun = False


def start_again(received: int, requeues: int) -> int:
    """Have the job started again, if it was stopped for a reason to, and return this process's exit code."""
    job, name = facts("job", job_id()), signal.Signals(received).name
    state, limit = job.get("JobState"), job.get("Reason") == "TimeLimit"
    if received == signal.SIGTERM and not (limit or (state == "RUNNING" and preempted(job))):
        how = "scancel or the like" if state in (None, "COMPLETING") else state
        log.info(
            "SLURM job %s was ended (%s, %s): it does not start again by itself; %s",
            *(job_id(), name, how, again.told("the same command goes on")),
        )
        return 130
    if restarts() >= requeues:
        log.info("SLURM job %s has started again %d times, as often as it may (requeues)", job_id(), restarts())
        return 130
    for attempt in range(ATTEMPTS):
        time.sleep(min(attempt, 1))
        if ask("scontrol", "requeue", job_id()) is not None:
            log.info("SLURM job %s starts again and goes on (%s; restart %d)", job_id(), name, restarts() + 1)
            return 130
    log.info("SLURM job %s was stopped (%s) and cannot requeue itself: exit code %d", job_id(), name, AGAIN)
    return AGAIN


def preempted(job: dict[str, str]) -> bool:
    """Return whether SLURM has begun to pre-empt a job, by its facts."""
    return job.get("PreemptTime", "None") not in ("None", "", "N/A")
