"""engine=slurm: the units of work as a job array, through submitit; the folder must be one that every node sees.

A job does its units like engine=local does, so the shards are the same. The process that waits only counts finished
units. What it started is written down beside them, so that a command given again, after a kill, ends the jobs before it
that are still at work and starts others for what is left.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.pack import Unit, unit_done
from data_prep.workers import Limits, do_units
from soratrain.data.atomic import replacing
from soratrain.errors import DataError

POLL = 1.0  # seconds between looks at what is finished
ASKED = 11  # times the queue is asked before it counts as gone


@dataclass(frozen=True)
class Array:
    """The job array: see conf/data_prep/data_prep.yaml, `slurm`."""

    jobs: int = 8
    cpus: int = 4
    minutes: int = 240
    mem_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: Sequence[str] = ()

    def parameters(self) -> dict[str, Any]:
        """Return what submitit is told; nothing for what is left to the cluster."""
        parameters = {
            "timeout_min": self.minutes,
            "cpus_per_task": self.cpus,
            "mem_gb": self.mem_gb,
            "slurm_partition": self.partition,
            "slurm_account": self.account,
            "slurm_qos": self.qos,
            "slurm_setup": list(self.setup) or None,
            "slurm_array_parallelism": self.jobs,
            "name": "data_prep",
        }
        return {key: value for key, value in parameters.items() if value is not None}


def do_units_as_jobs(
    folder: Path,
    units: Sequence[Unit],
    pending: Sequence[int],
    *,
    array: Array,
    limits: Limits,
    done: Callable[[int], None],
) -> None:
    """Do the `pending` units in jobs of an array; `done` is told the number of each as its result is seen.

    Raises:
        DataError: there is no SLURM here, it refuses the job, or a job ended before its work did.
    """
    if shutil.which("sbatch") is None:
        raise DataError("engine=slurm: there is no sbatch here; run it on a login node, or use engine=local")
    if not pending:
        return
    cancel_former(folder)
    shares = [list(pending[start :: array.jobs]) for start in range(min(array.jobs, len(pending)))]
    jobs = submit(folder, units, shares, array, limits)
    waiting = set(pending)
    try:
        while waiting:
            time.sleep(POLL)
            going = alive([job.job_id for job in jobs])  # asked first: what a job finished is then seen below
            for number in [number for number in waiting if unit_done(folder, number)]:
                waiting.discard(number)
                done(number)
            for job, share in zip(jobs, shares, strict=True):
                if job.job_id not in going and waiting.intersection(share):
                    raise DataError(f"{why(job)}; the same command continues")
    finally:
        cancel([job.job_id for job in jobs])
        (folder / "jobs.json").unlink(missing_ok=True)


def submit(
    folder: Path, units: Sequence[Unit], shares: Sequence[Sequence[int]], array: Array, limits: Limits
) -> list[Any]:
    """Submit a job for each share of the units and write their numbers down.

    Raises:
        DataError: SLURM refuses them, in its own words.
    """
    import submitit

    try:
        executor = submitit.AutoExecutor(folder=(folder / "jobs").resolve(), cluster="slurm")
        executor.update_parameters(**array.parameters())
        with executor.batch():
            jobs = [
                executor.submit(work, folder.resolve(), [(n, units[n]) for n in share], array.cpus, limits)
                for share in shares
            ]
    except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, RuntimeError) as error:
        said = " ".join(str(error).split())[-300:]
        raise DataError(f"engine=slurm: SLURM refuses the job: {said}; look at slurm.partition and its like") from error
    with replacing(folder / "jobs.json") as temporary:
        temporary.write_text(json.dumps([job.job_id for job in jobs]), encoding="utf-8")
    return jobs


def work(folder: Path, share: Sequence[tuple[int, Unit]], cpus: int, limits: Limits) -> None:
    """Do a share of the units; this is what a job runs."""
    units = {number: unit for number, unit in share if not unit_done(folder, number)}
    do_units(folder, units, list(units), processes=cpus, limits=limits, done=lambda number: None)


def cancel_former(folder: Path) -> None:
    """End the jobs of a command before this one, which was killed, and wait until they are gone."""
    path = folder / "jobs.json"
    if not path.is_file():
        return
    former = json.loads(path.read_text())
    cancel(former)
    while alive(former):
        time.sleep(POLL)
    path.unlink(missing_ok=True)


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, those that still go on."""
    subprocess.run(["scancel", *jobs], capture_output=True, check=False)


def alive(jobs: Sequence[str]) -> set[str]:
    """Return which of these tasks of one array wait or run. It asks the queue, since not every cluster has accounting.

    Raises:
        DataError: the queue does not answer for a minute.
    """
    (array,) = {job.split("_")[0] for job in jobs}
    command = ["squeue", "--noheader", "--array", "--format=%i", f"--jobs={array}"]
    for attempt in range(ASKED):
        time.sleep(attempt * POLL)
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode == 0 or "Invalid job id" in answer.stderr:  # long gone
            return set(answer.stdout.split()) & set(jobs)
    raise DataError(f"engine=slurm: squeue fails: {answer.stderr.strip()[-200:]}; the same command continues")


def why(job: Any) -> str:
    """Return why a job ended before its work did, from the last line that it said."""
    lines = [line for text in (job.stderr(), job.stdout()) for line in (text or "").splitlines() if line.strip()]
    said = f": {lines[-1].strip()[:300]}" if lines else " and said nothing"
    return f"engine=slurm: job {job.job_id} ended before its work did{said} (its log: {job.paths.stderr})"
