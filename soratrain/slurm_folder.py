"""Which SLURM job works on a run: no two may write into one folder, and one that starts again goes on with its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from soratrain import slurm
from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError

FILE = "slurm.json"  # in the run's folder


def worker(out: Path) -> dict[str, Any]:
    """Return what is known of the job that works, or worked, on the run in `out`."""
    file = out / FILE
    return json.loads(file.read_text()) if file.is_file() else {}


def assign(out: Path, **said: Any) -> None:
    """Write down which job works on the run in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / FILE) as path:
        path.write_text(json.dumps(said) + "\n", encoding="utf-8")


def begin(out: Path) -> None:
    """Write down that this job works on the run in `out`, and since which of its starts."""
    if not slurm.in_job():
        return
    known = worker(out)
    mine = known if known.get("job") == slurm.job_id() else {}
    if "start" not in mine:
        assign(out, **{**mine, "job": slurm.job_id(), "start": slurm.restarts()})


def check_free(out: Path) -> None:
    """Refuse to work on a run that another job works on.

    Raises:
        ConfigError: names the job.
    """
    job = worker(out).get("job")
    if job and not (slurm.in_job() and job == slurm.job_id()) and slurm.alive(job):
        raise ConfigError(f"{out}: SLURM job {job} works on it; wait for it, or end it: scancel {job}")


def begun_before(out: Path) -> bool:
    """Return whether this job, before SLURM started it again, has begun the run in `out`: then it goes on with it."""
    known = worker(out)
    return (
        slurm.in_job()
        and known.get("job") == slurm.job_id()
        and known.get("start", slurm.restarts()) < slurm.restarts()
    )
