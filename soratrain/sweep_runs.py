"""What became of the runs of a sweep: read from their folders, whoever ran them and wherever."""

from __future__ import annotations

import json
import math
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from soratrain import outputs, slurm, slurm_folder
from soratrain.data.atomic import replacing
from soratrain.errors import DataError

FILE = "sweep.json"  # in a run's folder: its overrides, and which process on which machine works on it


@dataclass(frozen=True)
class Outcome:
    """One run of a sweep.

    Attributes:
        folder: where it lies.
        values: what its command said, by key.
        state: `done`, `running`, `waiting`, `unfinished` or `failed`.
        note: why it failed, or how far it is.
        result: what a finished run says of itself.
        rows: its metrics so far, as in `metrics.csv`.
        seconds: that it took, of a finished run.
    """

    folder: Path
    values: dict[str, str]
    state: str
    note: str
    result: dict[str, object]
    rows: list[dict[str, str]]

    def metric(self, name: str) -> float:
        """Return a figure of a finished run, NaN where there is none."""
        value = self.result.get(name)
        return float(value) if isinstance(value, int | float) else math.nan

    def curve(self, name: str) -> list[tuple[float, float]]:
        """Return (step, value) of a column of its metrics."""
        return [(float(row["step"]), float(row[name])) for row in self.rows if row.get(name)]


def record(out: Path, overrides: Sequence[str], *, here: bool, code: int | None = None) -> None:
    """Write down in a run's folder what makes it this run of a sweep.

    Args:
        here: this process works on it, not a job somewhere else.
        code: with which its command has ended, if it has.
    """
    known: dict[str, object] = {"overrides": list(overrides)}
    if code is not None:
        known |= {"code": code}
    elif here:
        known |= {"host": socket.gethostname(), "process": os.getpid()}
    with replacing(out / FILE) as path:
        path.write_text(json.dumps(known) + "\n", encoding="utf-8")


def outcomes(folder: Path) -> list[Outcome]:
    """Return the runs of the sweep in `folder`.

    Raises:
        DataError: there is none.
    """
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; a sweep makes one: python -m soratrain -m stage=dit KEY=A,B")
    places = sorted(file.parent for file in folder.glob(f"*/{FILE}"))
    if not places:
        raise DataError(f"{folder}: holds no run of a sweep; make some: python -m soratrain -m stage=dit KEY=A,B")
    return [outcome(place) for place in places]


def outcome(place: Path) -> Outcome:
    """Return what became of the run in one folder."""
    from soratrain.callbacks.metrics import read_rows  # brings torch in, which those who begin a sweep can do without

    overrides = json.loads((place / FILE).read_text())["overrides"]
    values = {item.partition("=")[0].lstrip("+"): item.partition("=")[2] for item in overrides}
    result, rows = outputs.stored_result(place), read_rows(place / "metrics.csv")
    state, note = ("done", "") if result is not None else unfinished(place, rows)
    return Outcome(place, values, state, note, result or {}, rows)


def unfinished(place: Path, rows: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Return the state of a run without a result, and how far it is or why it failed."""
    config = outputs.stored_config(place) or {}
    steps = (config.get("trainer") or {}).get("max_steps")
    at = f"step {rows[-1]['step']} of {steps}" if rows else "no step yet"
    job = slurm_folder.worker(place).get("job")
    if job and (said := (slurm.ask("squeue", "--noheader", "--format=%T", f"--jobs={job}") or "").split()):
        return ("waiting" if said[0] in ("PENDING", "REQUEUED") else "running"), f"{at}, SLURM job {job}"
    if works_here(place):
        return "running", at
    code = json.loads((place / FILE).read_text()).get("code")
    reason = last_error(place) or (f"exit code {code}" if code else "")
    return ("failed", f"{at}: {reason}") if reason else ("unfinished", at)


def works_here(place: Path) -> bool:
    """Return whether the process that works on a run is on this machine and alive."""
    known = json.loads((place / FILE).read_text())
    if known.get("host") != socket.gethostname():
        return False
    try:
        os.kill(known["process"], 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def last_error(place: Path) -> str:
    """Return why a run ended, in its own words, if it said so after all else that it did."""
    for log in [place / "log.txt", *sorted((place / "logs").glob("rank-*.log"))]:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
        for line in reversed(lines[-20:]):
            _, found, said = line.partition("error: ")
            if found:
                return said.strip()
    return ""


def swept(runs: Sequence[Outcome]) -> list[str]:
    """Return the keys whose values differ between runs, those with most values first."""
    keys = list(dict.fromkeys(key for run in runs for key in run.values))
    different = {key: len({run.values.get(key) for run in runs}) for key in keys}
    return sorted((key for key in keys if different[key] > 1), key=lambda key: (-different[key], keys.index(key)))


def figure(runs: Sequence[Outcome], asked: str | None, usual: Sequence[str]) -> str:
    """Return the name of the figure that runs are compared by.

    Raises:
        DataError: no finished run has the one that was asked for.
    """
    there = {name for run in runs for name, value in run.result.items() if isinstance(value, int | float)}
    columns = {name for run in runs for row in run.rows for name in row}
    if asked is not None:
        if asked not in there | columns:
            raise DataError(
                f"stage.job.metric={asked}: no run reports it; there are: {', '.join(sorted(there | columns))}"
            )
        return asked
    return next((name for name in usual if name in there), next((name for name in usual if name in columns), usual[0]))
