"""The demo: the whole chain on the embedded world with the commands that anyone would type, then a table.

Run again it goes on: every stage skips or resumes what is done.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.table import Table

from soratrain.children import run_child

SHARDS = Path("data/world")
OUT = Path("outputs/default")
GIB = 2**30
ATTRIBUTES = ("color", "shape", "motion", "background", "number")


@dataclass(frozen=True)
class Step:
    """One command of the chain, and where its result stands."""

    name: str
    words: tuple[str, ...]
    result: Path


def steps() -> list[Step]:
    """Return the chain; every step is a command of its own."""
    world = Step("world", ("data_prep", "input=world", f"output={SHARDS}"), SHARDS)
    stages = ("vae", "captioner", "recaption", "encode", "dit", "sample", "evaluate")
    return [
        world,
        *(Step(name, ("soratrain", f"stage={name}", "machine=laptop"), OUT / name / "base") for name in stages),
    ]


class PeakMemory(threading.Thread):
    """Watch the resident memory of this process and its children."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.stopped = 0, threading.Event()

    def run(self) -> None:
        """Sample four times a second until stopped."""
        me = psutil.Process()
        while not self.stopped.wait(0.25):
            total = 0
            for process in [me, *me.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.Error:
                    continue
            self.peak = max(self.peak, total)


def percent(value: float | None) -> str:
    """Return a share as a percentage."""
    return "–" if value is None else f"{100 * value:.0f} %"


def stored(step: Step) -> dict[str, Any]:
    """Return what a step has written as its result, empty where it is not done."""
    file = step.result / ("dataset.json" if step.name == "world" else "result.json")
    return json.loads(file.read_text()) if file.is_file() else {}


def figure(step: Step) -> str:
    """Return the step's key figure for the table."""
    result = stored(step)
    report = result.get("report", {})
    match step.name:
        case "world":
            totals = result["totals"]
            return f"{totals['videos']} clips, {totals['images']} images, {totals['seconds']:.0f} s of video"
        case "vae":
            return f"reconstruction {result['psnr']:.1f} dB"
        case "recaption":
            return f"{result['captions']:.0f} captions, {result['captions_per_s']:.0f}/s"
        case "encode":
            return f"{result['clips']:.0f} clips, {result['clips_per_s']:.0f}/s"
        case "sample":
            return f"{result['samples']:.0f} clips"
        case "evaluate":
            return "colour {}, shape {}, motion {}".format(*(percent(overall(report, n)) for n in ATTRIBUTES[:3]))
        case _:
            return f"loss {result['loss']:.3f}"


def overall(report: dict[str, Any], name: str) -> float:
    """Return the share of all samples whose attribute is right."""
    return sum(split[name] for split in report["samples"].values()) / len(report["samples"])


def accuracy_table(report: dict[str, Any]) -> Table:
    """Return the oracle's readings: what is right, beside guessing and its reading of true renderings (ceiling).

    `seen`: new scenes of combinations that occur in training; `held out`: combinations that never do.
    """
    table = Table(title="What the oracle reads: share of clips that is right", title_justify="left")
    table.add_column("")
    for name in ATTRIBUTES:
        table.add_column(name, justify="right")
    table.add_column("PSNR", justify="right")

    def row(label: str, scores: dict[str, float]) -> None:
        quality = f"{scores['psnr']:.1f} dB" if "psnr" in scores else ""
        table.add_row(label, *(percent(scores.get(name)) for name in ATTRIBUTES), quality)

    row("guessing", report["chance"])
    for split, label in (("seen", "seen"), ("heldout", "held out")):
        table.add_section()
        row(f"[bold]samples[/], {label}", report["samples"][split])
        row(f"captions, {label}", report["captioner"][split])
        row(f"VAE's clips, {label}", report["reconstruction"][split])
        row(f"ceiling, {label}", report["ceiling"][split])
    return table


def main() -> int:
    """Run the chain and show the tables; return the exit code of the first step that fails."""
    console = Console()
    watch = PeakMemory()
    watch.start()
    began = time.monotonic()
    table = Table(title="soratrain demo", title_justify="left")
    for column in ("stage", "time", "peak memory", "key figure"):
        table.add_column(column, justify="left" if column in ("stage", "key figure") else "right")
    chain = steps()
    for number, step in enumerate(chain, 1):
        console.rule(f"[bold]{number}/{len(chain)} {step.name}[/]  python -m {' '.join(step.words)}", align="left")
        start, watch.peak = time.monotonic(), 0
        code = run_child([sys.executable, "-m", *step.words])
        if code:
            console.print(
                f"stage {step.name} ended with exit code {code}; mend it and run the demo again: it goes on here"
            )
            return code
        table.add_row(step.name, f"{time.monotonic() - start:.0f} s", f"{watch.peak / GIB:.1f} GiB", figure(step))
    table.add_section()
    table.add_row("all", f"{time.monotonic() - began:.0f} s", "", "")
    console.print()
    console.print(table)
    evaluation = stored(chain[-1])
    console.print(accuracy_table(evaluation["report"]))
    for file in sorted((OUT / "sample/base/samples").glob("*.mp4")):
        console.print(f"  {file}", soft_wrap=True)
    console.print(f"  {OUT}/evaluate/base/samples/*.mp4\n  [bold]{evaluation['contact_sheet']}[/]", soft_wrap=True)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.stderr.write("interrupted: make demo goes on from here\n")
        sys.exit(130)
