"""What a task of a SLURM job does, and what it has said at its end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from soratrain import slurm, slurm_folder

HEAD = "== SLURM job"  # begins what one start of a job says
# What a job's script says at its end (launcher_options.py): never a reason.
SCRIPT = re.compile(r"exit code \d+ of start|SLURM job \S+ has started again")


def said_in(logs: Sequence[Path]) -> list[tuple[Path, list[str]]]:
    """Return what each log holds since the job started last, without empty lines."""
    found = []
    for log in logs:
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        starts = [place for place, line in enumerate(lines) if line.startswith(HEAD)]
        found.append((log, lines[starts[-1] + 1 :] if starts else lines))
    return found


def errors_in(logs: Sequence[Path]) -> list[str]:
    """Return the first error of each log since the job started last, where there is one."""
    errors = ([line for line in lines if line.startswith("error:")][:1] for _, lines in said_in(logs))
    return [line for first in errors for line in first]


def begun_in(log: Path, job: str) -> int:
    """Return with which start of a job a log's last part begins; 0 where it is of another job."""
    starts = re.findall(rf"^{HEAD} (\S+), start (\d+)", log.read_text(errors="replace"), re.MULTILINE)
    return int(starts[-1][1]) if starts and starts[-1][0] == job else 0


def rank_logs(out: Path) -> list[Path]:
    """Return the logs of a run's ranks, the first rank's first."""
    return sorted((out / "logs").glob("rank-*.log"))


def why(out: Path) -> str:
    """Return why a run ended before it was done, from what its processes said last.

    Where the job's script has told of a start of which they say nothing, that is what the script says.
    """
    worker = slurm_folder.worker(out)
    script = [Path(worker["log"])] if worker.get("log") and Path(worker["log"]).is_file() else []
    ends = re.findall(r"exit code \d+ of start (\d+)", script[0].read_text(errors="replace")) if script else []
    ranks = [log for log in rank_logs(out) if not ends or begun_in(log, worker["job"]) >= int(ends[-1])]
    said: list[str] = []
    for log, lines in said_in([*ranks, *script]):
        errors = [line for line in lines if line.startswith("error:")]
        if errors:
            return f"{errors[0]} ({log})"
        lines = [line for line in lines if not SCRIPT.match(line)] or lines
        said += [f"{lines[-1][:300]} ({log})"] if lines else []
    return said[0] if said else f"it said nothing ({out}/logs)"


def work(words: Sequence[str], out: str) -> None:
    """Run a command in one task of a job and end with its exit code; what it says is kept in the run's folder.

    Signals are the command's business: submitit would start the job again before anything is saved. They are passed
    on, since many clusters signal a task's first process only (proctrack/cgroup).
    """
    heard: list[int] = []
    children: list[subprocess.Popen[bytes]] = []

    def pass_on(number: int, frame: Any) -> None:
        heard.append(number)
        for child in children:
            child.send_signal(number)

    for known in slurm.SIGNALS:
        signal.signal(known, pass_on)
    signal.signal(signal.SIGCONT, lambda number, frame: None)
    environment = dict(os.environ)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        environment.setdefault("OMP_NUM_THREADS", cpus)
    rank, node = slurm.number("SLURM_PROCID") or 0, os.environ.get("SLURMD_NODENAME", "?")
    log = Path(out) / "logs" / f"rank-{rank:05d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        size = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        start = f"start {slurm.restarts() + 1}, rank {rank} of {size} on {node}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        file.write(f"\n{HEAD} {slurm.job_id()}, {start}: soratrain {' '.join(words)}\n")
        file.flush()
        command = [sys.executable, "-m", "soratrain", *words]
        signal.pthread_sigmask(signal.SIG_BLOCK, slurm.SIGNALS)  # the command unblocks them once it listens
        child = subprocess.Popen(command, stdout=file, stderr=file, env=environment)
        children.append(child)
        for number in heard:
            child.send_signal(number)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, slurm.SIGNALS)
        code = child.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)
