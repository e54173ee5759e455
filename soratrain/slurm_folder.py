"""Which SLURM job works on a run: no two may write into one folder, and one that starts again goes on with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soratrain import outputs, slurm
from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError

FILE = "slurm.json"  # in the run's folder: the job, by whom it was submitted or by itself
START = "slurm-start.json"  # the job that has begun there and with which of its starts; written by none but the job


def worker(out: Path) -> dict[str, Any]:
    """Return what is known of the job that works, or worked, on the run in `out`."""
    file = out / FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def assign(out: Path, **said: Any) -> None:
    """Write down which job works on the run in `out`.

    Raises:
        DataError: the folder cannot be written to.
    """
    with outputs.written_to(out), replacing(out / FILE) as path:
        path.write_text(json.dumps(said) + "\n", encoding="utf-8")


def begun(out: Path) -> int | None:
    """Return with which of its starts this job has begun the run in `out`; None where it has not."""
    file = out / START
    known = json.loads(file.read_text()) if file.is_file() else {}
    return known["start"] if known.get("job") == slurm.job_id() else None


def begin(out: Path) -> None:
    """Write down that this job works on the run in `out`, and since which of its starts."""
    if not slurm.in_job():
        return
    if worker(out).get("job") != slurm.job_id():
        assign(out, job=slurm.job_id())
    if begun(out) is None:
        with replacing(out / START) as path:
            path.write_text(json.dumps({"job": slurm.job_id(), "start": slurm.restarts()}) + "\n", encoding="utf-8")


def check_free(out: Path) -> None:
    """Refuse to work on a run that another job works on.

    Raises:
        ConfigError: names the job.
        DataError: SLURM does not say whether it has ended.
    """
    job = worker(out).get("job")
    if job and not (slurm.in_job() and job == slurm.job_id()) and slurm.alive(job):
        raise ConfigError(f"{out}: SLURM job {job} works on it; wait for it, or end it: scancel {job}")


def begun_before(out: Path) -> bool:
    """Return whether this job, before SLURM started it again, has begun the run in `out`: then it goes on with it."""
    if not slurm.in_job():
        return False
    start = begun(out)
    return start is not None and start < slurm.restarts()
