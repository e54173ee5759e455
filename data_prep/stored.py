"""A finished folder's samples as units of work: the same media with other captions, nothing decoded again.

What comes of them is, byte for byte, what a build from the files would be.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from data_prep.files import SEVERAL, for_clips
from data_prep.output import read_lines
from data_prep.pack import NEAR, Report
from data_prep.records import Failure, Sample, Source, Tally
from soratrain.data.reading import read_table
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError

STEPS = ("probe", "shots", "transcode", "pack")  # that a file goes through


class Finished:
    """A finished folder, and the files that it was made from, with the captions that they have now.

    Attributes:
        rows: its manifest.
        failures: what was reported of its files after ingest.
    """

    def __init__(self, folder: Path, sources: Sequence[Source]) -> None:
        self.folder, self.sources = folder, sources
        self.reader = ShardReader(folder)

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        return list(read_table(self.folder).to_pylist())

    @cached_property
    def failures(self) -> list[Failure]:
        found = [Failure(**line) for line in read_lines(self.folder / "failures.jsonl")]
        return [failure for failure in found if failure.step != "ingest"]

    @cached_property
    def captions(self) -> tuple[dict[str, list[dict[str, Any]]], Report]:
        """The captions of each file's clips as K.json has them, and a report of those that cannot be theirs."""
        clips = Counter(self.record(row)["source"]["uri"] for row in self.rows)
        for failure in self.failures:  # a clip that was lost counts as well
            clips[failure.uri] += failure.step in ("transcode", "pack")
            clips[failure.uri] += 2 * (failure.reason == SEVERAL)
        report = Report()
        found = {
            source.uri: [asdict(caption) for caption in for_clips(source, clips[source.uri], report)]
            for source in self.sources
        }
        return found, report

    def record(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return K.json of a sample."""
        return dict(json.loads(self.reader.read(row["shard"], row["json_offset"], row["json_length"])))

    def report(self) -> Report:
        """Return what happened to the files after ingest, without what packing will report again."""
        report = self.captions[1]
        report.failures += [failure for failure in self.failures if failure.reason != SEVERAL]
        places = {source.uri: place for place, source in enumerate(self.sources)}
        report.failures.sort(key=lambda item: (item.step == "pack", places[item.uri], STEPS.index(item.step)))
        stats = json.loads((self.folder / "stats.json").read_text(encoding="utf-8"))
        tallies = [Tally.from_dict(row) for row in stats["funnel"]]
        report.tallies = {tally.step: tally for tally in tallies if tally.step != "ingest"}
        report.tallies["transcode"].how.pop(NEAR, None)
        packed = report.tallies["pack"]
        packed.entered, packed.left = packed.entered - packed.left, 0
        report.seconds = stats["seconds"]["in"]
        return report

    def samples(self, shard: str) -> Iterator[Sample]:
        """Yield the samples of a shard with the captions of now.

        Raises:
            DataError: a sample is not what it was.
        """
        for row in self.rows:
            if row["shard"] != shard:
                continue
            media = self.reader.read(shard, row["media_offset"], row["media_length"])
            if zlib.crc32(media) != row["crc32"]:
                raise DataError(f"{self.folder / shard} is damaged at sample {row['key']}; build into another output")
            record = self.record(row)
            record["captions"] = self.captions[0][record["source"]["uri"]]
            record["scores"].pop("duplicate_of", None)
            yield Sample(row["key"], row["kind"], row["ext"], media, record)


@dataclass(frozen=True)
class StoredUnit:
    """The samples of one finished shard; the first unit also tells what is known of the whole folder."""

    finished: Finished
    shard: str
    size: int
    first: bool

    def name(self, file: int) -> str:
        """Return the shard's name."""
        return self.shard

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Sample]:
        """Yield the samples with the captions that their files have now."""
        if self.first:
            report.add(self.finished.report())
        yield from self.finished.samples(self.shard)


def stored_units(folder: Path, shards: Mapping[str, int], sources: Sequence[Source]) -> list[StoredUnit]:
    """Return the units of a finished folder's shards, which are given with the number of samples in each."""
    finished = Finished(folder, sources)
    return [StoredUnit(finished, name, size, place == 0) for place, (name, size) in enumerate(shards.items())]
