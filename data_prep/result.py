"""What lies beside a task's shards: the manifest, captions, what was dropped, and the funnel; reading and writing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep import output
from data_prep.pack import Packed, Report, count, ordered
from data_prep.records import SCHEMA
from soratrain.amounts import counted
from soratrain.data.manifest import write_captions, write_manifest
from soratrain.data.shards import Shard
from soratrain.errors import DataError


def finished(folder: Path, task: str) -> dict[str, Any]:
    """Return dataset.json of a folder that `task` takes.

    Raises:
        DataError: data_prep has not finished it, or a shard is gone.
    """
    try:
        dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
        ours = dataset.get("made_by") == "data_prep" and not (folder / output.BUILDING).exists()
    except (OSError, ValueError, AttributeError):
        ours = False
    if not ours:
        raise DataError(f"input={folder} is no folder that data_prep has finished; task={task} takes one here")
    gone = [entry["name"] for entry in dataset["shards"] if not (folder / entry["name"]).is_file()]
    if gone:
        raise DataError(f"input={folder}: {gone[0]} is not there, of {counted(len(dataset['shards']), 'shards')}")
    return dict(dataset)


def packed_of(shards: Sequence[Shard], rows: Sequence[dict[str, Any]]) -> Packed:
    """Return shards with the totals and histograms of their manifest rows."""
    totals: dict[str, Any] = {"samples": 0, "videos": 0, "images": 0, "frames": 0, "seconds": 0.0, "bytes": 0}
    histograms: dict[str, dict[str, int]] = {"size": {}, "frames": {}, "fps": {}}
    for row in rows:
        count(totals, histograms, row)
    return Packed(tuple(shards), totals | {"seconds": round(totals["seconds"], 6)}, ordered(histograms))


def publish(
    folder: Path,
    identity: output.Identity,
    packed: Packed,
    rows: Sequence[dict[str, Any]],
    captions: Sequence[dict[str, str]],
    report: Report,
    *,
    keep_shards: bool = False,
    rated: dict[str, Any] | None = None,
) -> None:
    """Write the tables beside the shards in `folder/.building/shards` and publish all of it (`output.publish`)."""
    building = folder / output.BUILDING / "shards"
    write_manifest(building, rows)
    if captions:
        write_captions(building / "captions" / "gt" / "part-00000.parquet", captions)
    output.write_lines(building / "failures.jsonl", [asdict(failure) for failure in report.failures])
    funnel = [tally.as_dict() for tally in report.tallies.values()]
    seconds = {"in": round(report.seconds, 6), "out": packed.totals["seconds"]}
    output.write_json(building / "stats.json", {"schema": SCHEMA, "funnel": funnel, "seconds": seconds})
    output.publish(folder, output.described(identity, packed, rated), keep_shards=keep_shards)
