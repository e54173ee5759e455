"""stage=sweep_report: what a sweep's runs came to, as a table, a CSV and a picture."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soratrain.data.atomic import replacing
from soratrain.errors import DataError
from soratrain.sweep_plot import STATES, draw, summary
from soratrain.sweep_runs import FILE, Outcome, figure, outcomes, swept


class SweepReport:
    """The job of `stage=sweep_report`.

    Args:
        out: folder of `STAGE.csv` and `STAGE.png`.
        run: whose sweeps are reported, one of each stage.
        folder: of one sweep, in their place.
        metric: the figure that runs are compared by; None is what a sweep returns.
    """

    def __init__(self, *, out: str | Path, run: str, folder: str | None = None, metric: str | None = None) -> None:
        self.out, self.run, self.folder, self.metric = Path(out), run, folder, metric

    def __call__(self) -> dict[str, object]:
        """Print, write and draw the report; return how many runs are in which state.

        Raises:
            DataError: there is no sweep.
        """
        folders = [Path(self.folder)] if self.folder else sorted(Path("outputs", self.run).glob("*/sweep"))
        folders = [folder for folder in folders if self.folder or any(folder.glob(f"*/{FILE}"))]
        if not folders:
            raise DataError(
                f"outputs/{self.run}: holds no sweep; make one: python -m soratrain -m stage=dit run={self.run} KEY=A,B"
                " or give another run=NAME, or stage.job.folder=FOLDER"
            )
        counts = dict.fromkeys(STATES, 0)
        for folder in folders:
            for run in self.report(folder):
                counts[run.state] += 1
        return {"runs": sum(counts.values()), **counts}

    def report(self, folder: Path) -> list[Outcome]:
        """Report one sweep and return its runs, best first."""
        runs = outcomes(folder)
        name, keys = figure(runs, self.metric), swept(runs)
        runs.sort(key=lambda run: (math.isnan(run.metric(name)), run.metric(name), run.folder.name))
        stage = folder.parent.name
        place = self.out / stage
        show(runs, keys, name, f"sweep of stage={stage}: {folder}")
        write(place.with_suffix(".csv"), runs, keys, name)
        draw(place.with_suffix(".png"), f"{folder}", runs, keys, name)
        Console(soft_wrap=True).print(f"{summary(runs, name)}\n{place}.csv  {place}.png", highlight=False)
        return runs


def show(runs: Sequence[Outcome], keys: Sequence[str], name: str, title: str) -> None:
    """Print the runs, best first."""
    table = Table(title=escape(title), title_justify="left")
    for heading in ("run", *keys, name, "steps", "seconds", "state"):
        right = heading in (name, "steps", "seconds")
        table.add_column(heading, justify="right" if right else "left", overflow="fold")
    for run in runs:
        value, seconds = run.metric(name), run.metric("seconds")
        figures = [f"{value:.6g}" if math.isfinite(value) else "-", run.rows[-1]["step"] if run.rows else "-"]
        figures.append(f"{seconds:.0f}" if math.isfinite(seconds) else "-")
        state = f"{run.state}: {run.note}" if run.note else run.state
        values = (run.values.get(key, "-") for key in keys)
        table.add_row(*map(escape, (run.folder.name, *values, *figures, state)))
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def write(path: Path, runs: Sequence[Outcome], keys: Sequence[str], name: str) -> None:
    """Write the runs as CSV: what was swept over, the state, and all figures of each result."""
    figures = dict.fromkeys(key for run in runs for key, value in run.result.items() if isinstance(value, int | float))
    columns = [name, *(key for key in figures if key != name)]
    with replacing(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["run", *keys, "state", "note", *columns])
        for run in runs:
            values = [run.metric(column) for column in columns]
            shown = ["" if math.isnan(value) else f"{value:.9g}" for value in values]
            writer.writerow([run.folder.name, *(run.values.get(key, "") for key in keys), run.state, run.note, *shown])
