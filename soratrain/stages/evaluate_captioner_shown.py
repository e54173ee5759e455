"""The report of a captioner for a terminal: three tables that fit 80 columns, and what their figures mean."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from soratrain.amounts import counted
from soratrain.stages.evaluate_ways_shown import percent

SETS = {"shards": "shards", "seen": "seen", "heldout": "held out"}
NAMES = {
    "color": "colour",
    "shape": "shape",
    "number": "number",
    "motion": "motion",
    "size": "size",
    "camera": "camera",
    "place": "place",
    "background": "ground",
}
WAYS = ("video_to_text", "text_to_video")
MEANING = (
    "seen, held out: new scenes of combinations that occur in training, that never do\n"
    "true: the true captions read the same way; another: another clip's caption"
)


def figure(value: float | None, digits: int = 2) -> str:
    """Return a number, a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}f}"


def label(item: Mapping[str, Any], style: str) -> str:
    """Return what a row is called."""
    return f"{SETS[item['name']]}, {style}"


def chief_of(report: Mapping[str, Any]) -> tuple[Mapping[str, Any], str]:
    """Return the set and the style whose figures are the chief ones: the last set, `long` where that is asked for."""
    return report["sets"][-1], "long" if "long" in report["styles"] else report["styles"][0]


def text_rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield a row of each set and style."""
    for item in report["sets"]:
        for style, found in item["styles"].items():
            spoken, rows = found["language"], [(label(item, style), found["scores"], found["language"])]
            rows += [("  true", None, found["true"])] if found["true"] else []
            rows += [("  another", found["another"], None)] if found["another"] else []
            for name, scores, spoken in rows:
                scored = [figure((scores or {}).get(key)) for key in ("bleu_4", "cider_d", "rouge_l")]
                share = [percent(spoken[key]) for key in ("repeated", "empty")] if spoken else ["", ""]
                told = (
                    [figure(spoken["words"], 1), f"{spoken['vocabulary']:.0f}", figure(spoken["type_token"], 3)]
                    if spoken
                    else ["", "", ""]
                )
                yield [name, *(["", "", ""] if name == "  true" else scored), *told, *share]


def said_in(world: Mapping[str, Any]) -> set[str]:
    """Return the figures that a style has: of what its true captions speak of, and what is invented."""
    return {key for key, share in (world["true"] or world["ours"]).items() if share or key == "invented"}


def world_rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield rows of each set and style of the world: the captioner's, the ceiling, guessing."""
    for item in report["sets"]:
        for style, found in item["styles"].items():
            world = found["world"]
            if not world:
                continue
            said = said_in(world)
            for name, key in ((label(item, style), "ours"), ("  true", "true"), ("  another", "another")):
                if world[key]:
                    cells = [percent(world[key].get(part)) if part in said else "" for part in (*NAMES, "invented")]
                    yield [name, *cells]


def recall_rows(report: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield a row of each set and style, and of chance."""
    for item in report["sets"]:
        for style, found in item["recall"].items():
            if found:
                ways = [percent(found[way][f"at_{rank}"]) for way in WAYS for rank in (1, 5, 10)]
                yield [label(item, style), str(found["clips"]), *ways, percent(found["chance"]["at_1"])]


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a narrow table whose first column is words and the others are figures."""
    shown = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False, padding=0)
    for index, name in enumerate(columns):
        shown.add_column(name, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        shown.add_row(*map(escape, row))
    return shown


def show(console: Console, report: Mapping[str, Any]) -> None:
    """Print the tables, and what they mean."""
    columns = ["captions", "BLEU-4", "CIDEr-D", "ROUGE-L", "words", "vocab", "type/tok", "repeat", "empty"]
    console.print(table("captions beside the true ones", columns, list(text_rows(report))))
    if rows := list(world_rows(report)):
        console.print(table("% named rightly, on the world", ["captions", *NAMES.values(), "invented"], rows))
        console.print(MEANING)
        console.print("invented: objects named that are not there, of those named")
    if rows := list(recall_rows(report)):
        columns = ["recall, %", "clips", "clip→text 1", "5", "10", "text→clip 1", "5", "10", "chance"]
        console.print(table("who finds whom, among clips of distinct captions", columns, rows))
    for line in remarks(report):
        console.print(escape(line))
    console.print(escape(f"the last line's figures: {label(*chief_of(report))}; its clips: of all sets"))


def remarks(report: Mapping[str, Any]) -> Iterator[str]:
    """Yield in words what is not in the tables."""
    for key in ("contrast", "text_scores"):
        if report[key] != "yes":
            yield report[key]
    for item in report["sets"]:
        lacking = [style for style, found in item["styles"].items() if not found["compared"]]
        if lacking:
            yield f"{SETS[item['name']]}: no clip has a true caption of the style {', '.join(lacking)}"
        for reason, count in item["left_out"].items():
            yield f"{SETS[item['name']]}: {counted(count, 'clips')} {reason} left out"
    for style in report["styles"]:
        if images := sum(item["clips"] - item["styles"][style]["asked"] for item in report["sets"]):
            yield f"not asked for {style}: {counted(images, 'images')}, which {'has' if images == 1 else 'have'} none"
    yield from report["remarks"]
    clips = sum(item["clips"] for item in report["sets"])
    yield f"{counted(clips, 'clips')}, {report['captions_per_s']:.3g} captions/s"
