"""The table at the end of a run: what came in, what got out, what did not and why."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from data_prep.pack import Packed, Report
from data_prep.records import Failure
from soratrain.amounts import counted

SHOWN = 12  # reasons listed before the rest is summed


def show(console: Console, folder: Path, report: Report, packed: Packed) -> None:
    """Print the funnel, the totals and the reasons."""
    table = Table(title=f"data_prep: {folder}", title_justify="left")
    for name in ("step", "in", "out", "how, and what was dropped"):
        table.add_column(name, justify="right" if name in ("in", "out") else "left", overflow="fold")
    for tally in report.tallies.values():
        notes = [f"{count} {how}" for how, count in sorted(tally.how.items())]
        notes += [f"dropped {count}: {reason}" for reason, count in tally.dropped.most_common()]
        table.add_row(tally.step, counted(tally.entered, tally.unit), str(tally.left), "\n".join(notes))
    console.print(table)
    totals = packed.totals
    images, shards = counted(totals["images"], "images"), counted(len(packed.shards), "shards")
    console.print(
        f"{counted(totals['videos'], 'clips')} ({totals['seconds']:.1f} s of video, {report.seconds:.1f} s came in) "
        f"and {images} in {shards}, {totals['bytes'] / 1e6:.1f} MB"
    )
    for line in report.captions.lines() if report.captions else ():
        console.print(line)
    reasons = Counter(map(grouped, report.failures))
    for reason, count in reasons.most_common(SHOWN):
        console.print(f"  {count} × {reason}")
    if len(reasons) > SHOWN:
        console.print(f"  and {counted(len(reasons) - SHOWN, 'reasons')} more")
    if reasons:
        console.print(f"  each file and its reason: {folder / 'failures.jsonl'}")


def grouped(failure: Failure) -> str:
    """Return a failure's reason, the same for all samples that one rule of select leaves out."""
    if failure.step == "select":
        rule, _, value = failure.reason.partition(": ")
        return rule if value else "near duplicate of another"
    return f"{failure.reason} ({failure.used})" if failure.used else failure.reason
