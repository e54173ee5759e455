"""task=index: a manifest for WebDataset tars that are there already, ours or another's, without rewriting them.

Samples made by data_prep are described by their `K.json`. Of another's (video2dataset's, say) the media members are
probed (`indexed.py`); their captions go to `captions/gt/`, and their keys are hashes of shard and name, since names are
only unique within a shard. A tar is a unit of work, done like those of a build: in processes that are watched, and not
again after an interruption. Where a key occurs twice the first is taken, in the order of the tars' names.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from data_prep import output, result, summary
from data_prep.indexed import STEPS, TarUnit
from data_prep.live import Live
from data_prep.pack import Packed, Report, clean, read_report, read_samples, unit_done
from data_prep.records import Failure
from data_prep.schema import PrepConfig
from data_prep.workers import Limits, do_units
from soratrain.amounts import counted
from soratrain.data.shards import Shard
from soratrain.errors import DataError


def index(config: PrepConfig, console: Console) -> None:
    """Write manifest/, dataset.json and the rest beside the tars that `input` names.

    Raises:
        DataError: there are no tars, or nothing in them can be used.
        ConfigError: the folder was indexed with other settings, or its tars have changed since.
    """
    folder, tars = find(config)
    if not config.fresh and (task := output.made(folder)) not in (None, "index"):
        require_known(folder, tars, result.finished(folder, "index"))
        console.print(f"{folder} is finished already, by task={task}, and needs no index")
        return
    listing = hashlib.blake2b(digest_size=8)
    for path in tars:
        listing.update(f"{path.name}\x1f{path.stat().st_size}\x1e".encode("utf-8", "replace"))
    identity = output.Identity(config.identity(), listing.hexdigest())
    state = output.claim(folder, identity, fresh=config.fresh, indexed=True)
    if state == "done":
        console.print(f"{folder} is indexed, by the same command; fresh=true indexes it again")
        return
    with output.held(folder):
        report = Report()
        work(config, console, folder, tars, resumed=state == "continue")
        packed, rows, captions = merge(folder / output.BUILDING / "units", tars, report)
        if not rows:
            output.discard(folder)
            first = f": {report.failures[0].uri}: {report.failures[0].reason}" if report.failures else ""
            raise DataError(f"input={config.input}: no sample of {counted(len(tars), 'tars')} can be used{first}")
        result.publish(folder, identity, packed, rows, captions, report, keep_shards=True)
    summary.show(console, folder, report, packed)


def require_known(folder: Path, tars: list[Path], dataset: dict[str, Any]) -> None:
    """Raise DataError where the tars of a folder that another task has made are not those that it made."""
    shards = {entry["name"]: entry["bytes"] for entry in dataset["shards"]}
    there = {path.name: path.stat().st_size for path in tars}
    odd = sorted(name for name in shards.keys() | there.keys() if shards.get(name) != there.get(name))
    if odd:
        raise DataError(
            f"input={folder}: {odd[0]} is not what dataset.json tells of: it was added, removed or written again; "
            "task=validate finds what is wrong, and fresh=true indexes the tars as they are"
        )


def find(config: PrepConfig) -> tuple[Path, list[Path]]:
    """Return the folder and its tars, in order of their names. Raises DataError where there are none."""
    folder = Path(config.input)
    if config.folder.resolve() != folder.resolve():
        raise DataError(f"output={config.output}: an index lies beside its shards; leave output out")
    if not folder.is_dir():
        raise DataError(f"input={config.input} is not a folder; task=index takes the folder that holds the tars")
    tars = sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))
    if not tars:
        raise DataError(f"input={config.input} holds no *.tar; task=build makes shards from videos")
    return folder, tars


def work(config: PrepConfig, console: Console, folder: Path, tars: list[Path], *, resumed: bool) -> None:
    """Read the tars that are not read yet, over all cores."""
    units, target = [TarUnit(path) for path in tars], folder / output.BUILDING / "units"
    clean(target)
    for number, path in enumerate(tars):
        for known in (target / f"{number:06d}.json", target / f"{number:06d}.skip.json"):
            if known.is_file() and path.stat().st_mtime > known.stat().st_mtime:  # the tar was written again since
                known.unlink()
    pending = [number for number in range(len(units)) if not unit_done(target, number)]
    if resumed:
        console.print(f"{folder}: continuing, {len(units) - len(pending)} of {counted(len(units), 'tars')} read")
    limits = Limits(**asdict(config.limits))
    figures: dict[str, Any] = {"begun": Report(), "steps": STEPS, "result": "index", "unit": "tars", "verb": "read"}
    with Live("index", target, units, pending, bytes_of=lambda n: tars[n].stat().st_size, **figures) as live:
        processes, done, doing = config.processes, live.done, live.doing
        do_units(target, units, pending, processes=processes, limits=limits, done=done, doing=doing)


def merge(units: Path, tars: list[Path], report: Report) -> tuple[Packed, list[dict[str, Any]], list[dict[str, str]]]:
    """Return the totals, the manifest rows and the foreign captions of all tars, and add their reports to `report`."""
    rows: list[dict[str, Any]] = []
    captions: list[dict[str, str]] = []
    shards: list[Shard] = []
    seen: dict[str, str] = {}  # key to where the first is
    _, tally = report.tally("read", "tars"), report.tally("index", "samples")  # in the order of the funnel
    for number, path in enumerate(tars):
        before, found = len(rows), read_report(units, number)
        report.add(found)
        for row, record, _ in read_samples(units, number):
            uri = record["uri"]
            if row["key"] in seen:
                reason, what = f"has the key of {seen[row['key']]}, which is used", "has the key of another"
                if record["repeats"]:
                    reason = f"repeats member {record['repeats']} of {seen[row['key']]}, which is used"
                    what = "repeats a member of the sample before"
                report.failures.append(Failure(uri, "index", reason))
                tally.left -= 1
                tally.dropped[what] += 1
                continue
            seen[row["key"]] = f"{uri} (byte {row['media_offset']})"
            rows.append(row)
            captions += [{"key": row["key"], **caption} for caption in record["captions"]]
        shards.append(Shard(path.name, path.stat().st_size, len(rows) - before, found.sha256))
    packed = result.packed_of(shards, rows)
    report.seconds = packed.totals["seconds"]
    return packed, rows, captions
