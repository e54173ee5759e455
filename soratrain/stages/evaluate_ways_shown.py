"""The report of the ways to sample for people: two tables that fit 80 columns, and a contact sheet of all ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from data_prep.world import measure
from soratrain.sheet import Row, contact_sheet
from soratrain.stages.evaluate import NOTED, value
from soratrain.stages.evaluate_ways_drawn import Drawn

GIVEN = "what has a border was given"
SPLIT = {"seen": "seen", "heldout": "held out"}
HEADINGS = {
    "t2v": "t2v: from the text alone",
    "animate": "animate: the first frame is given",
    "extend": "extend: the first 9 of 17 frames are given",
    "extend back": "extend backwards: the last 9 of 17 frames are given",
    "connect": "connect: 5 frames at each end are given, 7 drawn between",
    "loop": "loop: 9 frames are given, 7 drawn that lead back to the first",
    "inpaint": "inpaint: the veiled part is drawn anew",
    "edit": "edit: noised in part and drawn anew as another text says",
    "refine": "refine: from half the size (left, as bicubic shows it)",
    "refine rate": "refine: from half the frames a second (left, mixtures between)",
}


def percent(share: float | None) -> str:
    """Return a share in percent, a dash where there is none."""
    return "–" if share is None else f"{100 * share:.0f}"


def number(figure: float | None) -> str:
    """Return a number of pixels or decibels, a dash where there is none."""
    return "–" if figure is None else f"{figure:.1f}"


def exact(clean: Mapping[str, Any]) -> str:
    """Return whether what is given stays, or by how much it does not."""
    if clean["latent"] is None and clean["pixels"] is None:
        return "–"
    if not clean["latent"] and not clean["pixels"]:
        return "exact"
    return f"[red]{clean['latent'] or 0:.1g} {clean['pixels'] or 0}[/]"


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table whose first column is words and the others are figures."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for index, name in enumerate(columns):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    return shown


def way_rows(ways: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield a row of each way and split."""
    for row in ways:
        joint = row["joint"]
        within = f"{percent(joint['pixels']['within'])} {percent(joint['place']['within'])}" if joint else "–"
        agreed = [percent(row["agreement"].get(name)) for name in ("color", "shape", "motion", "background", "number")]
        name = row["way"] if row["split"] == "seen" else "  held out"
        yield [name, str(row["clips"]), *agreed, number(row.get("place_px")), within, exact(row["clean"])]


def path_rows(trajectories: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """Yield a row of each trajectory."""
    for row in trajectories:
        name = f"{row['given']} given, {row['after']} on" if row["split"] == "seen" else "  held out"
        sides = [f"{number(row[key]['px'])} {100 * row[key]['side']:.0f}%" if row[key]["px"] is not None else "–"
                 for key in ("drawn", "copy", "velocity", "vae")]  # fmt: skip
        kept = [percent(row["kept"][key]) for key in ("color", "shape")]
        yield [name, str(row["clips"]), *sides, *kept, percent(row["lost"])]


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the tables, and what they mean."""
    if report["ways"]:
        columns = ["way", "n", "colour", "shape", "motion", "ground", "number", "place", "joints", "given"]
        console.print(table("ways to sample, on the world", columns, list(way_rows(report["ways"]))))
        console.print(
            "% of clips read as wanted in what was drawn · place: mean px from the true path\n"
            "joints: % of jumps (pixels, place) below 95 % of true ones · given: unchanged"
        )
        for row in report["ways"]:
            short = [f"{name} {percent(share)} %" for name, share in row["ceiling"].items() if share < 1]
            parts = [f"of the true clip itself, {' and '.join(short)}"] if short else []
            if joint := row["joint"]:
                within = percent(joint["pixels"]["vae"]), percent(joint["place"]["vae"])
                parts.append("joints of the true clip through the VAE {} {} %".format(*within))
            if "noise" in row:
                parts.append(f"from noise {row['noise']:.2f}")
            if "psnr" in row:
                psnr = [number(row[key]) for key in ("psnr", "psnr_before", "psnr_vae")]
                parts.append("PSNR {} dB, before {}, VAE {}".format(*psnr))
            if parts:
                console.print(f"{row['way']}, {SPLIT[row['split']]}: {'; '.join(parts)}")
    if report["trajectories"]:
        columns = ["first frames", "n", "drawn", "copied", "velocity", "vae", "colour", "shape", "lost"]
        console.print(
            table("where the object is, px and % of the side off", columns, list(path_rows(report["trajectories"])))
        )
        console.print("copied: the last given frame; velocity: its speed kept; vae: the true clip there")
    if windows := report["windows"]:
        within = percent(windows["pixels"]["within"]), percent(windows["place"]["within"])
        console.print(f"between windows: {windows['joints']} joints, {within[0]} % and {within[1]} % below that bound")


def draw_sheet(
    path: Path,
    clips: Mapping[tuple[str, str], Sequence[Drawn]],
    moved: Mapping[tuple[int, int, str], Sequence[Drawn]],
    shown: int,
) -> None:
    """Draw `shown` clips of each way and split, of those that draw anew beside what they began with."""
    sections: dict[str, list[Row]] = {}
    for number, ((way, split), some) in enumerate(clips.items()):
        for one in chosen(some, shown, number // len(SPLIT)):
            before = one.case.source
            if before is not None:
                row = Row(f"{SPLIT[split]}: what it began with", before, [(GIVEN, None)], whole(before))
                sections.setdefault(HEADINGS[way], []).append(row)
            sections.setdefault(HEADINGS[way], []).append(row_of(one, SPLIT[split]))
    longest = max((after for _, after, _ in moved), default=0)
    for (given, after, split), some in moved.items():
        heading = f"{'animate' if given == 1 else 'extend'}: {given} given, {after} drawn (left, the true clip)"
        for one in chosen(some, shown, given) if after == longest else ():
            rows = sections.setdefault(heading, [])
            rows.append(Row(f"{SPLIT[split]}: the true clip", one.case.truth, [(GIVEN, None)], one.case.given))
            rows.append(row_of(one, SPLIT[split]))
    title = "soratrain: every way to sample. A border marks what was given; words are what the oracle reads in the rest"
    contact_sheet(path, title, list(sections.items()))


def chosen(some: Sequence[Drawn], count: int, turn: int) -> list[Drawn]:
    """Return `count` clips, others for each `turn`, of those that move and are square before others."""
    ranked = sorted(some, key=lambda one: (one.case.scene.truth.objects[0].motion == "still", uneven(one)))
    best = [one for one in ranked if uneven(one) == uneven(ranked[0])]
    return [best[(turn * count + index) % len(best)] for index in range(min(count, len(best)))]


def uneven(one: Drawn) -> float:
    """Return by how much a clip is not square."""
    height, width = one.frames.shape[1:3]
    return max(height, width) / min(height, width)


def whole(frames: np.ndarray) -> np.ndarray:
    """Return that all frames were given."""
    return np.ones(len(frames), bool)


def row_of(one: Drawn, split: str) -> Row:
    """Return a clip's row: what was asked for, and what the oracle reads in what was drawn."""
    case, seen = one.case, measure(one.frames[~one.case.given])
    notes = [
        (str(value(seen, key) or "nothing"), value(seen, key) == value(case.wanted, key))
        for key in NOTED
        if value(case.wanted, key) is not None
    ]
    return Row(f"{split}: {case.prompt}", one.frames, notes, case.given)
