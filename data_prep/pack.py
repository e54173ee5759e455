"""Units of work on disk, and packing them into shards.

A worker writes what it made of one unit as a tar of samples and a JSON of tallies and failures, each whole or not
there. When all units are done, they are packed in order, so shards do not depend on which worker did what or when.
"""

from __future__ import annotations

import json
import os
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Protocol

from data_prep.matched import Matched
from data_prep.records import Failure, Sample, Tally, dumps
from data_prep.similar import duplicates
from soratrain.data.atomic import replacing
from soratrain.data.manifest import write_manifest
from soratrain.data.shards import Placed, Shard, ShardWriter

NEAR = "near duplicates of another, marked"


@dataclass
class Report:
    """What happened to one unit of work, or to all of them."""

    tallies: dict[str, Tally] = field(default_factory=dict)
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0
    captions: Matched | None = None  # of the whole input
    sha256: str = ""  # of the tar that was read, where that is the unit

    def tally(self, step: str, unit: str) -> Tally:
        """Return the tally of `step`, which counts `unit` (files or clips)."""
        return self.tallies.setdefault(step, Tally(step, unit))

    def add(self, other: Report) -> None:
        """Add what happened to another unit."""
        for step, tally in other.tallies.items():
            self.tally(step, tally.unit).add(tally)
        self.failures += other.failures
        self.seconds += other.seconds


class Unit(Protocol):
    """Some of the input, which one process turns into samples; the same each time."""

    @property
    def size(self) -> int:
        """How many files or scenes it is made of."""

    def name(self, file: int) -> str:
        """Return what a person would call its file number `file`; with pulse.NOWHERE all of it, or nothing."""

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Sample]:
        """Yield its samples and count in `report` what entered and left each step.

        `skips` are files by number that may not be touched again, and why.
        """


@dataclass(frozen=True)
class Packed:
    """The finished shards and the totals of what is in them."""

    shards: tuple[Shard, ...]
    totals: dict[str, Any]
    histograms: dict[str, dict[str, int]]


def unit_done(folder: Path, number: int) -> bool:
    """Return whether unit `number` is finished; its JSON is written last."""
    return (folder / f"{number:06d}.json").is_file()


def write_unit(folder: Path, number: int, samples: Iterable[Sample], report: Report) -> None:
    """Write a unit's samples as they come, then its report, which `samples` may still fill while it is read."""
    with replacing(folder / f"{number:06d}.tar") as temporary, tarfile.open(temporary, "w") as tar:
        for sample in samples:
            header = dumps({"row": sample.row(), "record": sample.record})
            for name, data in (("head", header.encode()), ("media", sample.media)):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, BytesIO(data))
    value = {
        "tallies": [tally.as_dict() for tally in report.tallies.values()],
        "failures": [asdict(failure) for failure in report.failures],
        "seconds": report.seconds,
        "sha256": report.sha256,
    }
    with replacing(folder / f"{number:06d}.json") as temporary:
        temporary.write_text(dumps(value), encoding="utf-8")


def read_report(folder: Path, number: int) -> Report:
    """Return a finished unit's report."""
    value = json.loads((folder / f"{number:06d}.json").read_text(encoding="utf-8"))
    tallies = [Tally.from_dict(row) for row in value["tallies"]]
    failures = [Failure(**row) for row in value["failures"]]
    return Report({tally.step: tally for tally in tallies}, failures, value["seconds"], sha256=value.get("sha256", ""))


def read_heads(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """Yield K.json of each sample of a finished unit, passing over the media."""
    with tarfile.open(folder / f"{number:06d}.tar") as tar:
        while (head := tar.next()) is not None:
            yield json.loads(_content(tar, head))["record"]
            tar.next()


def near_duplicates(units: Path, numbers: Iterable[int], report: Report) -> dict[str, str]:
    """Return which contents in the units are near duplicates, each with the first of its like; count them."""
    heads = (head for number in numbers for head in read_heads(units, number) if "phash" in head["scores"])
    clips = {head["key"]: (head["scores"]["phash"], seconds_of(head["video"])) for head in heads}  # each content once
    found = duplicates([(key, *clip) for key, clip in clips.items()])
    if found:
        report.tally("transcode", "clips").how[NEAR] += len(found)
    return found


def seconds_of(video: dict[str, Any]) -> float:
    """Return how long a clip is, from its K.json."""
    return video["frames"] * video["fps"][1] / video["fps"][0]


def read_samples(folder: Path, number: int) -> Iterator[tuple[dict[str, Any], dict[str, Any], bytes]]:
    """Yield (manifest columns, K.json, media bytes) of a finished unit."""
    with tarfile.open(folder / f"{number:06d}.tar") as tar:
        while (head := tar.next()) is not None:
            header = json.loads(_content(tar, head))
            media = tar.next()
            assert media is not None, "a unit's members come in pairs"
            yield header["row"], header["record"], _content(tar, media)


def pack(
    units: Path,
    numbers: Sequence[int],
    target: Path,
    *,
    max_bytes: int,
    report: Report,
    seen: Callable[[], None] = lambda: None,
) -> Packed:
    """Pack the units' samples, in order, into shards and a manifest under `target`; count them in `report`.

    Each unit is read twice, which `seen` is told each time.

    A sample whose content was packed before (the same bytes under another name) is dropped and recorded. One that only
    looks like another is kept, and says so in its scores: `duplicate_of`.
    """
    alike = near_duplicates(units, told(numbers, seen), report)
    tally = report.tally("pack", "clips")
    rows: list[dict[str, Any]] = []
    packed: dict[str, str] = {}
    totals: dict[str, Any] = {"samples": 0, "videos": 0, "images": 0, "frames": 0, "seconds": 0.0, "bytes": 0}
    histograms: dict[str, dict[str, int]] = {"size": {}, "frames": {}, "fps": {}}
    with ShardWriter(target, max_bytes=max_bytes) as writer:
        for number in told(numbers, seen):
            for row, record, media in read_samples(units, number):
                tally.entered += 1
                uri = record["source"]["uri"]
                if row["key"] in packed:
                    tally.dropped["the same content under two names"] += 1
                    reason = f"has the same content as {packed[row['key']]}, which is used"
                    report.failures.append(Failure(uri, "pack", reason))
                    continue
                packed[row["key"]] = uri
                if row["key"] in alike:
                    record["scores"]["duplicate_of"] = alike[row["key"]]
                    row["scores"] = dumps(record["scores"])
                placed = writer.write(row["key"], {"json": dumps(record).encode(), row["ext"]: media})
                rows.append(row | place_of(placed, row["ext"]) | {"crc32": zlib.crc32(media)})
                tally.left += 1
                count(totals, histograms, rows[-1])
    write_manifest(target, rows)
    return Packed(tuple(writer.finished), totals | {"seconds": round(totals["seconds"], 6)}, ordered(histograms))


def told(numbers: Iterable[int], seen: Callable[[], None]) -> Iterator[int]:
    """Yield `numbers`; `seen` is called after each."""
    for number in numbers:
        yield number
        seen()


def place_of(placed: Placed, ext: str) -> dict[str, Any]:
    """Return the manifest columns that say where a sample lies."""
    (json_offset, json_length), (offset, length) = placed.members["json"], placed.members[ext]
    places = {"json_offset": json_offset, "json_length": json_length, "media_offset": offset, "media_length": length}
    return {"shard": placed.shard} | places


def count(totals: dict[str, Any], histograms: dict[str, dict[str, int]], row: dict[str, Any]) -> None:
    """Add one manifest row to the totals and histograms of dataset.json."""
    video = row["kind"] == "video"
    totals["samples"] += 1
    totals["videos" if video else "images"] += 1
    totals["frames"] += row["frames"]
    totals["bytes"] += row["media_length"]
    if video:
        totals["seconds"] += row["frames"] * row["fps_den"] / row["fps_num"]
    for name, value in (
        ("size", f"{row['w']}x{row['h']}"),
        ("frames", str(row["frames"])),
        ("fps", f"{row['fps_num'] / row['fps_den']:.4g}" if video else "image"),
    ):
        histograms[name][value] = histograms[name].get(value, 0) + 1


def ordered(histograms: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """Return histograms with their largest counts first."""
    return {
        name: dict(sorted(counts.items(), key=lambda item: (-item[1], item[0]))) for name, counts in histograms.items()
    }


def clean(units: Path) -> None:
    """Remove what workers that were stopped left half written."""
    for path in units.glob(".*.tmp"):
        os.unlink(path)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()
