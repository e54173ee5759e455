"""task=select: some of a folder's samples by their stored scores, into a folder of its own; nothing is decoded.

The new folder's shards are the old ones (hard links, or links where the file system has none across folders), only its
tables are new, so trying another threshold costs seconds and no space. `task=repack` makes it stand on its own.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep import output, result, summary
from data_prep.pack import Packed, Report
from data_prep.records import Failure
from data_prep.report import write as write_report
from data_prep.schema import PrepConfig, SelectConfig
from soratrain.amounts import counted
from soratrain.data.caption_table import read_original_captions
from soratrain.data.reading import read_table
from soratrain.data.shards import Shard
from soratrain.errors import ConfigError, DataError

Row = dict[str, Any]


@dataclass(frozen=True)
class Rule:
    """One threshold: which setting it is, what it reads of a row and its scores, and whether a value passes."""

    name: str
    value: Callable[[Row, dict[str, Any]], float | str | None]
    passes: Callable[[Any, Any], bool]
    score: str = ""  # what it reads is this score, not a fact of the media

    def reason(self, limit: Any) -> str:
        """Return why a sample is left out by this rule."""
        return f"select.{self.name}={limit:g}" if isinstance(limit, float) else f"select.{self.name}={limit}"


def scored(name: str, score: str, passes: Callable[[Any, Any], bool]) -> Rule:
    """Return a threshold on a score."""
    return Rule(name, score_of(score), passes, score)


def score_of(name: str) -> Callable[[Row, dict[str, Any]], Any]:
    """Return a reader of one score; None where a sample has none."""
    return lambda row, scores: scores.get(name)


def seconds(row: Row, scores: dict[str, Any]) -> float | None:
    """Return the duration of a clip; None of an image."""
    return row["frames"] * row["fps_den"] / row["fps_num"] if row["kind"] == "video" else None


def at_least(value: float, limit: float) -> bool:
    """Return whether a value is not below its limit."""
    return value >= limit


def at_most(value: float, limit: float) -> bool:
    """Return whether a value is not above its limit."""
    return value <= limit


RATED = ("aesthetic", "text_area")  # scores by trained models
RULES = (
    Rule("min_seconds", seconds, at_least),
    Rule("max_seconds", seconds, at_most),
    Rule("min_side", lambda row, scores: min(row["w"], row["h"]), at_least),
    Rule("max_aspect", lambda row, scores: max(row["w"] / row["h"], row["h"] / row["w"]), at_most),
    Rule("min_fps", lambda row, s: row["fps_num"] / row["fps_den"] if row["kind"] == "video" else None, at_least),
    *(scored(f"max_{name}", name, at_most) for name in ("black", "static", "letterbox", "blur", "motion")),
    scored("min_motion", "motion", at_least),
    scored("min_aesthetic", "aesthetic", at_least),
    scored("max_text_area", "text_area", at_most),
    Rule("duplicates", score_of("duplicate_of"), lambda value, limit: limit == "keep"),
)


def select(config: PrepConfig, console: Console) -> None:
    """Write the folder that `output` names.

    Raises:
        DataError: the input is no finished folder here, a threshold is on a score that it has none of, or nothing
            passes.
        ConfigError: the output is the input, or was made with other settings.
    """
    source = Path(config.input)
    if config.folder.resolve() == source.resolve():
        raise ConfigError(f"output={config.output} is the input, which would be lost; select into another folder")
    dataset = result.finished(source, "select")
    rows = read_table(source).to_pylist()
    look_for_scores(config, rows)
    identity = output.Identity(config.identity(), output.fingerprint(dataset))
    if output.claim(config.folder, identity, fresh=config.fresh) == "done":
        console.print(f"{config.folder} is complete and was made by the same command; fresh=true makes it again")
        if not (config.folder / "report.html").is_file():  # a kill came between it and the rest
            write_report(config.folder)
        return
    report = Report()
    with output.held(config.folder):
        try:
            packed = make(config, rows, dataset, identity, report)
        except BaseException:
            output.discard(config.folder)
            raise
    summary.show(console, config.folder, report, packed)
    console.print(f"  what was kept and what was not, as a page: {write_report(config.folder)}")


def look_for_scores(config: PrepConfig, rows: list[Row]) -> None:
    """Raise DataError where a threshold would pass everything, since no sample has its score; defaults may."""
    default = SelectConfig()
    for rule in (rule for rule in RULES if rule.score):
        limit = getattr(config.select, rule.name)
        if limit is None or limit == getattr(default, rule.name):
            continue
        if any(rule.score in json.loads(row["scores"]) for row in rows):
            continue
        where = "clips of its tars" if rule.score in ("motion", "static") else "what is in its tars"
        given = f"task=build input='{Path(config.input) / '*.tar'}' gives {where}"
        what = f"has no {rule.score}, which {'task=score gives' if rule.score in RATED else given}"
        raise DataError(f"{rule.reason(limit)}: input={config.input} {what}; or leave it out")


def make(
    config: PrepConfig, rows: list[Row], dataset: dict[str, Any], identity: output.Identity, report: Report
) -> Packed:
    """Choose, link the shards that are still needed, and publish."""
    source = Path(config.input)
    building = config.folder / output.BUILDING / "shards"
    building.mkdir(parents=True, exist_ok=True)
    kept = list(chosen(rows, config.select, report))
    if not kept:
        tally = report.tallies["select"]
        worst = "; ".join(f"{reason} ({number})" for reason, number in tally.dropped.most_common(3))
        raise DataError(
            f"input={config.input}: none of {counted(tally.entered, 'samples')} passes: {worst}; lower a threshold"
        )
    needed = {row["shard"] for row in kept}
    shards = tuple(Shard(**entry) for entry in dataset["shards"] if entry["name"] in needed)
    for shard in shards:
        link(source / shard.name, building / shard.name)
    keys = {row["key"] for row in kept}
    captions = [row for row in read_original_captions(source) if row["key"] in keys]
    packed = result.packed_of(shards, kept)
    result.publish(config.folder, identity, packed, kept, captions, report, rated=dataset.get("rated"))
    return packed


def chosen(rows: list[Row], thresholds: SelectConfig, report: Report) -> Iterator[Row]:
    """Yield the rows that pass every threshold that is set; each other one is recorded with the first it fails.

    What has no such score (an image has no motion) passes, and is counted.
    """
    tally = report.tally("select", "samples")
    rules = [(rule, limit) for rule in RULES if (limit := getattr(thresholds, rule.name)) is not None]
    for row in rows:
        tally.entered += 1
        scores = json.loads(row["scores"])
        report.seconds += seconds(row, scores) or 0.0
        tally.how["without scores: made before there were any, or by another"] += "phash" not in scores
        for rule, limit in rules:
            value = rule.value(row, scores)
            if value is None and rule.score in RATED:
                tally.how[f"without a score for select.{rule.name}, and so kept"] += 1
            if value is not None and not rule.passes(value, limit):
                why = f"{rule.reason(limit)}: {value:.4g}" if isinstance(value, int | float) else f"like {value}"
                report.failures.append(Failure(row["key"], "select", why))
                tally.dropped[rule.reason(limit)] += 1
                break
        else:
            tally.left += 1
            yield row
    tally.how = +tally.how  # without those that are none


def link(source: Path, target: Path) -> None:
    """Let `target` be the file `source`, without copying where that can be."""
    target.unlink(missing_ok=True)
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        try:
            os.symlink(source.resolve(), target)
        except OSError:
            shutil.copyfile(source, target)
