"""task=repack: the samples of a finished folder in new shards of their own, of another size or shuffled.

Media and our `K.json` go over byte for byte; nothing is decoded. What `task=select` chose stands on its own afterwards,
and what `task=index` found gets a `K.json` like every other sample's, with its captions in it. A shard of the result is
a unit of work: what an interruption leaves finished is not written again.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import av
from rich.console import Console

import soratrain
from data_prep import output, result, summary
from data_prep.indexed import ours
from data_prep.pack import Packed, Report, clean, place_of, seconds_of
from data_prep.records import SCHEMA, Failure, dumps
from data_prep.report import write as write_report
from data_prep.schema import PrepConfig
from soratrain.data.caption_table import read_original_captions
from soratrain.data.members import json_object
from soratrain.data.order import permutation
from soratrain.data.reading import read_table
from soratrain.data.shards import Shard, ShardReader, ShardWriter
from soratrain.errors import ConfigError, DataError

BLOCK = tarfile.BLOCKSIZE
Row = dict[str, Any]


def repack(config: PrepConfig, console: Console) -> None:
    """Write the folder that `output` names.

    Raises:
        DataError: the input is no finished folder here, or nothing in it is whole.
        ConfigError: the output is the input, or was made with other settings.
    """
    source = Path(config.input)
    if config.folder.resolve() == source.resolve():
        raise ConfigError(f"output={config.output} is the input; repack into another folder, then remove the old one")
    dataset = result.finished(source, "repack")
    identity = output.Identity(config.identity(), output.fingerprint(dataset))
    state = output.claim(config.folder, identity, fresh=config.fresh)
    if state == "done":
        console.print(f"{config.folder} is complete and was made by the same command; fresh=true makes it again")
        if not (config.folder / "report.html").is_file():  # a kill came between it and the rest
            write_report(config.folder)
        return
    report = Report()
    with output.held(config.folder):
        packed = make(config, console, identity, report, rated=dataset.get("rated"), resumed=state == "continue")
    summary.show(console, config.folder, report, packed)
    console.print(f"  what is in it, as a page: {write_report(config.folder)}")


def make(
    config: PrepConfig,
    console: Console,
    identity: output.Identity,
    report: Report,
    *,
    rated: dict[str, Any] | None,
    resumed: bool,
) -> Packed:
    """Write the shards that are not there yet and publish all of them."""
    source, building = Path(config.input), config.folder / output.BUILDING
    samples = read_table(source).to_pylist()
    if config.repack.shuffle is not None:
        samples = [samples[place] for place in permutation(len(samples), "repack", config.repack.shuffle)]
    units = list(divided(samples, config.shards.mb << 20))
    captions: dict[str, list[dict[str, str]]] = {}
    for row in read_original_captions(source):
        captions.setdefault(row["key"], []).append(row)
    prep = {"config_hash": identity.hash, "versions": {"soratrain": soratrain.__version__, "av": av.__version__}}
    job = Job(source, building / "shards", building / "units", captions, prep)
    clean(job.units)
    clean(job.target)
    if resumed:
        there = sum(job.unit(number).is_file() for number in range(len(units)))
        console.print(f"{config.folder}: continuing, {there} of {len(units)} shards were done")
    shards, rows, tally = [], [], report.tally("repack", "samples")
    foreign: set[str] = set()
    with ThreadPoolExecutor(config.processes) as pool:
        try:
            for made in pool.map(job.do, range(len(units)), units):
                rows += made["rows"]
                foreign |= set(made["foreign"])
                shards += [Shard(**entry) for entry in made["shards"]]
                report.failures += [Failure(**failure) for failure in made["failures"]]
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    tally.entered, tally.left = len(samples), len(rows)
    for failure in report.failures:
        tally.dropped[failure.reason] += 1
    if foreign:
        tally.how["got a K.json: another made them"] = len(foreign)
    if not rows:
        output.discard(config.folder)
        raise DataError(f"input={config.input}: none of {len(samples)} samples is whole: {report.failures[0].reason}")
    report.seconds = result.packed_of((), samples).totals["seconds"]
    packed = result.packed_of(shards, rows)
    kept = [row for key in sorted({row["key"] for row in rows} - foreign) for row in captions.get(key, ())]
    result.publish(config.folder, identity, packed, rows, kept, report, rated=rated)
    return packed


def divided(rows: Sequence[Row], max_bytes: int) -> Iterator[list[Row]]:
    """Yield the samples of one shard after another: as many as fit, at least one."""
    part: list[Row] = []
    size = 0
    for row in rows:
        own = sum(BLOCK + -(-row[name] // BLOCK) * BLOCK for name in ("json_length", "media_length"))
        if part and size + own > max_bytes:
            yield part
            part, size = [], 0
        part.append(row)
        size += own
    if part:
        yield part


@dataclass(frozen=True)
class Job:
    """What each shard is made from and where it goes.

    Attributes:
        source: the finished folder.
        target: folder of the new shards.
        units: folder of what is told of each of them.
        captions: what lies beside the source's shards, by key.
        prep: of a new K.json.
    """

    source: Path
    target: Path
    units: Path
    captions: Mapping[str, Sequence[dict[str, str]]]
    prep: Mapping[str, Any]

    def unit(self, number: int) -> Path:
        """Return the file that is there when shard `number` is finished."""
        return self.units / f"{number:06d}.json"

    def do(self, number: int, rows: Sequence[Row]) -> dict[str, Any]:
        """Return `shard(number, rows)`, done now or before."""
        if not self.unit(number).is_file():
            output.write_json(self.unit(number), self.shard(number, rows))
        return dict(json.loads(self.unit(number).read_text(encoding="utf-8")))

    def shard(self, number: int, rows: Sequence[Row]) -> dict[str, Any]:
        """Write shard `number`; return its manifest rows, what dataset.json tells of it, and what was dropped."""
        placed, foreign, failures = [], [], []
        reader = ShardReader(self.source)
        with ShardWriter(self.target, max_bytes=1 << 62, start=number) as writer:
            for row in rows:
                try:
                    record, media, new = self.sample(reader, row)
                except DataError as error:
                    failures.append(asdict(Failure(f"{row['shard']}/{row['key']}", "repack", str(error))))
                    continue
                where = writer.write(row["key"], {"json": record, row["ext"]: media})
                placed.append(row | place_of(where, row["ext"]))
                foreign += [row["key"]] if new else []
        reader.close()
        shards = [asdict(shard) for shard in writer.finished]
        return {"rows": placed, "shards": shards, "foreign": foreign, "failures": failures}

    def sample(self, reader: ShardReader, row: Row) -> tuple[bytes, bytes, bool]:
        """Return a sample's K.json and media, and whether the K.json is new, since another made the sample.

        Raises:
            DataError: bytes are missing or changed.
        """
        media = reader.read(row["shard"], row["media_offset"], row["media_length"])
        if zlib.crc32(media) != row["crc32"]:
            raise DataError("its bytes are not those that the manifest knows (CRC-32)")
        text = reader.read(row["shard"], row["json_offset"], row["json_length"]) if row["json_length"] else b"{}"
        record = json_object(text)
        if ours(record, row["key"]):
            return text, media, False
        header = reader.read(row["shard"], row["media_offset"] - BLOCK, BLOCK)
        name = f"{row['shard']}/{tarfile.TarInfo.frombuf(header, 'utf-8', 'replace').name}"
        return dumps(self.described(row, record, media, name)).encode(), media, True

    def described(self, row: Row, theirs: dict[str, Any], media: bytes, name: str) -> dict[str, Any]:
        """Return K.json of a sample that another made; what that says of it is kept under `foreign`."""
        video = {"w": row["w"], "h": row["h"], "fps": [row["fps_num"], row["fps_den"]], "frames": row["frames"]}
        end = round(seconds_of(video) * 1e6) if row["kind"] == "video" else 0
        digest = hashlib.blake2b(media, digest_size=16).hexdigest()
        captions = [{name: row[name] for name in row if name != "key"} for row in self.captions.get(row["key"], ())]
        return {
            "schema": SCHEMA,
            "key": row["key"],
            "source": {"id": digest, "uri": name, "start_us": 0, "end_us": end, "license": ""},
            "video": video,
            "scores": json.loads(row["scores"]),
            "captions": captions,
            "prep": dict(self.prep),
            "foreign": theirs,
        }
