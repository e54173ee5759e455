"""task=score: what trained models say of a finished folder's samples, added to the scores in its manifest.

A clip's score is the mean over a few of its frames, evenly spread and none at its ends, where fades are. Shards stay as
they are, and so does `K.json` in them: these scores are in the manifest alone, and dataset.json says under `rated` from
which weights they are. Until all are known they lie in `.scoring/`, one file a shard, so that an interruption costs one
shard's work, and the folder is whole and usable at every moment.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from data_prep import output
from data_prep.pictures import Found, Row, ahead, looked_at
from data_prep.raters import Model, models_of
from data_prep.records import dumps
from data_prep.report import write as write_report
from data_prep.result import finished
from data_prep.schema import PrepConfig, hash_of
from soratrain.amounts import counted
from soratrain.data.manifest import write_manifest
from soratrain.data.reading import read_table
from soratrain.errors import DataError

SCORING, SCORED = ".scoring", "done"
UNSCORED = "unscored.jsonl"
SHOWN = 12  # failures listed


@dataclass(frozen=True)
class Job:
    """One model's work in a folder, and where what it has found of each shard lies."""

    model: Model
    folder: Path

    def part(self, shard: str) -> Path:
        """Return the file that is there when a shard is done."""
        return self.folder / f"{shard}.json"


def score(config: PrepConfig, console: Console) -> None:
    """Add the scores whose weights are given to the folder that `input` names.

    Raises:
        DataError: it is no finished folder here, another is at work in it, or nothing in it can be scored.
        ConfigError: weights are not what they should be.
    """
    folder = Path(config.input)
    dataset = finished(folder, "score")
    models = models_of(config.score)
    what = output.fingerprint(dataset | {"rated": None})
    jobs = [Job(model, folder / SCORING / f"{what}-{hash_of(model.identity)}") for model in models]
    made = {job.model.name: job.model.made(dataset.get("rated", {}).get(job.model.name)) for job in jobs}
    jobs = [job for job in jobs if config.fresh or job.folder.is_dir() or not made[job.model.name]]
    if not jobs:
        console.print(f"{folder} has {' and '.join(made)} from these weights; fresh=true scores it again")
        return
    with held(folder, what):
        rows = read_table(folder).to_pylist()
        found = work(config, console, jobs, rows)
        for job in jobs:
            if not found.scores[job.model.name]:
                shutil.rmtree(job.folder)
                why = next(iter(found.failures.values()))
                raise DataError(f"input={folder}: none of {len(rows)} samples has a score {job.model.name}: {why}")
        if finished(folder, "score") != dataset:
            raise DataError(f"input={folder} was made again while it was scored; the same command scores it as it is")
        publish(folder, dataset, jobs, rows, found)
    for job in jobs:
        scores, names = found.scores[job.model.name], " and ".join(job.model.record["from"].values())
        mean = f"{fmean(scores.values()):.4g} in the mean"
        console.print(f"{folder}: {len(scores)} of {len(rows)} samples scored: {job.model.name}, {mean}, from {names}")
    for key, why in list(found.failures.items())[:SHOWN]:
        console.print(f"  {key}: {why}")
    if found.failures:
        console.print(
            f"  {counted(len(found.failures), 'samples')} without a score; each and its reason: {folder / UNSCORED}"
        )


@contextmanager
def held(folder: Path, what: str) -> Iterator[None]:
    """Keep other runs out of a folder's scores, and remove what is known of anything but `what` it holds now.

    Raises:
        DataError: one is at work already.
    """
    (folder / SCORING).mkdir(exist_ok=True)
    with open(folder / SCORING / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"input={folder}: another task=score is at work there; wait for it") from error
        for path in (folder / SCORING).iterdir():
            if path.is_dir() and not path.name.startswith(what):
                shutil.rmtree(path)
        try:
            yield
        finally:
            if not any(path.is_dir() for path in (folder / SCORING).iterdir()):  # or something is unfinished
                shutil.rmtree(folder / SCORING)


def work(config: PrepConfig, console: Console, jobs: Sequence[Job], rows: Sequence[Row]) -> Found:
    """Score the shards that are not scored yet, and return what is known of all."""
    shards = {name: list(group) for name, group in groupby(rows, key=lambda row: row["shard"])}
    lacking = {shard: [job for job in jobs if not job.part(shard).is_file()] for shard in shards}
    pending = [shard for shard in shards if lacking[shard]]
    if len(pending) < len(shards):
        console.print(f"{config.input}: continuing, {len(shards) - len(pending)} of {len(shards)} shards were done")
    models = {job.model.name: job.model for shard in pending for job in lacking[shard]}
    raters = {name: model.load() for name, model in models.items()}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
    with bar, ThreadPoolExecutor(config.processes) as pool:
        task = bar.add_task("score", total=sum(len(shards[shard]) for shard in pending))
        for shard in pending:
            used = {job.model.name: raters[job.model.name] for job in lacking[shard]}
            look = partial(looked_at, folder=Path(config.input), raters=used, frames=config.score.frames)
            found = Found()
            for row, seen in zip(shards[shard], ahead(pool, look, shards[shard], 2 * config.processes), strict=True):
                found.add(row["key"], seen)
                found.rate(used, config.score.batch)
                bar.advance(task)
            found.rate(used, 1)
            for job in lacking[shard]:
                output.write_json(job.part(shard), found.told(job.model.name))
    return merged(jobs, shards)


def merged(jobs: Sequence[Job], shards: Iterable[str]) -> Found:
    """Return what the files of finished shards tell."""
    found = Found()
    for job in jobs:
        for shard in shards:
            told = json.loads(job.part(shard).read_text(encoding="utf-8"))
            found.scores.setdefault(job.model.name, {}).update(told["scores"])
            found.failures |= told["failures"]
    return found


def publish(folder: Path, dataset: dict[str, Any], jobs: Sequence[Job], rows: Sequence[Row], found: Found) -> None:
    """Write the manifest with the scores, then what tells of them; a kill in between costs only these steps again."""
    names = [job.model.name for job in jobs]
    for row in rows:
        scores = {name: value for name, value in json.loads(row["scores"]).items() if name not in names}
        scores |= {name: found.scores[name][row["key"]] for name in names if row["key"] in found.scores[name]}
        row["scores"] = dumps(scores)
    write_manifest(folder, rows)
    (folder / UNSCORED).unlink(missing_ok=True)
    if found.failures:
        output.write_lines(folder / UNSCORED, [{"key": key, "reason": why} for key, why in found.failures.items()])
    rated = dataset.get("rated", {}) | {job.model.name: job.model.record for job in jobs}
    output.write_json(folder / "dataset.json", dataset | {"rated": rated})
    write_report(folder)
    for job in jobs:  # renamed first, or a kill could leave some of it to be taken for work
        os.replace(job.folder, job.folder.with_name(SCORED))
        shutil.rmtree(job.folder.with_name(SCORED))
