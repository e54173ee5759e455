"""What became of the runs of a sweep: read from their folders, whoever ran them and wherever."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from soratrain import outputs, slurm, slurm_folder
from soratrain.children import ended_by
from soratrain.data.atomic import replacing
from soratrain.distributed.neighbours import RUNS, STOPPED, Card
from soratrain.errors import DataError
from soratrain.launcher_task import errors_in, rank_logs

TRAINED = ("val_loss", "loss")  # the first one that a stage reports is what a sweeper minimises
METRICS = (*TRAINED, "clips_per_s", "captions_per_s", "samples")  # of a job that trains nothing
FILE = "sweep.json"  # in a run's folder: its overrides, and which process on which machine works on it


@dataclass(frozen=True)
class Outcome:
    """One run of a sweep.

    Attributes:
        folder: where it lies.
        values: what its command said, by key.
        state: `done`, `diverged` (at the end, without a loss), `running`, `waiting`, `unfinished` or `failed`.
        note: why it failed or has no loss, or how far it is.
        result: what a finished run says of itself.
        rows: its metrics so far, as in `metrics.csv`.
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


def compared(result: Mapping[str, object]) -> tuple[str, float]:
    """Return the name and the value of what finished runs are compared by, NaN where this one has no such figure."""
    usual = TRAINED if "step" in result else METRICS
    for name in usual:
        if isinstance(value := result.get(name), int | float):
            return name, float(value)
    return usual[-1], math.nan


def diverged(result: Mapping[str, object]) -> str:
    """Return why a run that has made all its steps ends without a loss; empty where it has one, or trains nothing."""
    if "step" not in result or math.isfinite(compared(result)[1]):
        return ""
    skipped = result.get("bad_steps")
    known = isinstance(skipped, int | float) and skipped > 0
    return f"no loss: {skipped:.0f} updates were skipped, the last ones among them" if known else "no loss"


def record(out: Path, overrides: Sequence[str], *, here: bool, code: int | None = None) -> None:
    """Write down in a run's folder what makes it this run of a sweep.

    Args:
        here: this process works on it, not a job somewhere else.
        code: with which its command has ended, if it has.

    Raises:
        DataError: the folder cannot be written to.
    """
    known: dict[str, object] = {"overrides": list(overrides)}
    if code is not None:
        known |= {"code": code}
    elif here:
        known |= asdict(Card.own())
    with outputs.written_to(out), replacing(out / FILE) as path:
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
    lost = diverged(result or {})
    state, note = ("diverged" if lost else "done", lost) if result is not None else unfinished(place, rows)
    return Outcome(place, values, state, note, result or {}, rows)


def unfinished(place: Path, rows: Sequence[dict[str, str]]) -> tuple[str, str]:
    """Return the state of a run without a result, and how far it is or why it failed."""
    config = outputs.stored_config(place) or {}
    steps = (config.get("trainer") or {}).get("max_steps")
    at = f"step {rows[-1]['step']} of {steps}" if rows else "no step yet"
    if job := slurm_folder.worker(place).get("job"):
        said = slurm.queued([job])
        if said is None:
            return "unfinished", f"{at}, SLURM job {job}, of which squeue says nothing now"
        if said:
            return ("waiting" if said[0].state in ("PENDING", "REQUEUED") else "running"), f"{at}, SLURM job {job}"
    if works_here(place):
        return "running", at
    code = json.loads((place / FILE).read_text()).get("code")
    reason = last_error(place) or (ended_by(code) if code else "")
    return ("failed", f"{at}: {reason}") if reason else ("unfinished", at)


def works_here(place: Path) -> bool:
    """Return whether the process that works on a run is on this machine and alive."""
    known = json.loads((place / FILE).read_text())
    names = [item.name for item in fields(Card)]
    return all(name in known for name in names) and Card(**{name: known[name] for name in names}).state() in (
        RUNS,
        STOPPED,
    )


def last_error(place: Path) -> str:
    """Return why a run ended, in its own words, if it said so after all else that it did: what came before is over."""
    log = place / "log.txt"
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "")
    if last.startswith("error: "):
        return last.removeprefix("error: ").strip()
    later = [own for own in rank_logs(place) if not lines or own.stat().st_mtime >= log.stat().st_mtime]
    return next(iter(errors_in(later)), "").removeprefix("error:").strip()


def swept(runs: Sequence[Outcome]) -> list[str]:
    """Return the keys whose values differ between runs, those with most values first."""
    keys = list(dict.fromkeys(key for run in runs for key in run.values))
    different = {key: len({run.values.get(key) for run in runs}) for key in keys}
    return sorted((key for key in keys if different[key] > 1), key=lambda key: (-different[key], keys.index(key)))


def figure(runs: Sequence[Outcome], asked: str | None) -> str:
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
    usual = TRAINED if "step" in there | columns else METRICS
    return next((name for name in usual if name in there), next((name for name in usual if name in columns), usual[0]))
