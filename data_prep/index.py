"""task=index: a manifest for WebDataset tars that are there already, ours or another's, without rewriting them.

Samples made by data_prep are described by their `K.json`. Of another's (video2dataset's, say) the media members are
probed; their captions, from `K.txt` or from `caption` in `K.json`, go to `captions/gt/`, and their keys are hashes of
shard and name, since names are only unique within a shard.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
from rich.console import Console

from data_prep import output, summary
from data_prep.kinds import IMAGES, VIDEOS
from data_prep.media import UPRIGHT, Unusable, decoded, turn_of, video_stream
from data_prep.pack import Packed, Report, count, ordered
from data_prep.records import SCHEMA, Failure, dumps
from data_prep.schema import PrepConfig
from data_prep.sidecars import texts_in
from soratrain.data.manifest import write_captions, write_manifest
from soratrain.data.shards import KEY, Shard
from soratrain.errors import DataError

TROUBLE = (Unusable, av.FFmpegError, OSError, ValueError, KeyError, TypeError)


@dataclass
class Group:
    """The members of one sample: extension to (offset of its bytes, length)."""

    name: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)


def index(config: PrepConfig, console: Console) -> None:
    """Write manifest/, dataset.json and the rest beside the tars that `input` names.

    Raises:
        DataError: there are no tars, or nothing in them can be used.
        ConfigError: the folder was indexed with other settings, or its tars have changed since.
    """
    folder, tars = find(config)
    listing = hashlib.blake2b(digest_size=8)
    for path in tars:
        listing.update(f"{path.name}\x1f{path.stat().st_size}\x1e".encode())
    identity = output.Identity(config.identity(), listing.hexdigest())
    if output.claim(folder, identity, fresh=config.fresh, indexed=True) == "done":
        console.print(f"{folder} is indexed, by the same command; fresh=true indexes it again")
        return
    report = Report()
    with output.held(folder):
        try:
            packed = make(config, folder, tars, identity, report)
        except BaseException:
            output.discard(folder)
            raise
    summary.show(console, folder, report, packed)


def make(config: PrepConfig, folder: Path, tars: list[Path], identity: output.Identity, report: Report) -> Packed:
    """Read the tars and publish what describes them. Raises DataError where nothing in them can be used."""
    building = folder / output.BUILDING / "shards"
    packed, rows, captions = read(tars, report)
    if not rows:
        first = f": {report.failures[0].uri}: {report.failures[0].reason}" if report.failures else ""
        raise DataError(f"input={config.input}: no sample of {len(tars)} tars can be used{first}")
    write_manifest(building, rows)
    if captions:
        write_captions(building / "captions" / "gt" / "part-00000.parquet", captions)
    output.write_lines(building / "failures.jsonl", [asdict(failure) for failure in report.failures])
    funnel = [tally.as_dict() for tally in report.tallies.values()]
    seconds = {"in": packed.totals["seconds"], "out": packed.totals["seconds"]}
    output.write_json(building / "stats.json", {"schema": SCHEMA, "funnel": funnel, "seconds": seconds})
    output.publish(folder, output.described(identity, packed), keep_shards=True)
    return packed


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


def read(tars: list[Path], report: Report) -> tuple[Packed, list[dict[str, Any]], list[dict[str, str]]]:
    """Return the totals, the manifest rows and the foreign captions of some tars; count them in `report`."""
    tally = report.tally("index", "samples")
    rows: list[dict[str, Any]] = []
    captions: list[dict[str, str]] = []
    shards: list[Shard] = []
    seen: dict[str, str] = {}
    totals: dict[str, Any] = {"samples": 0, "videos": 0, "images": 0, "frames": 0, "seconds": 0.0, "bytes": 0}
    histograms: dict[str, dict[str, int]] = {"size": {}, "frames": {}, "fps": {}}
    for path in tars:
        before = len(rows)
        with open(path, "rb") as file:
            for group in groups(path, report):
                tally.entered += 1
                uri = f"{path.name}/{group.name}"
                try:
                    row, texts = describe(path, group, file)
                    if row["key"] in seen:
                        raise Unusable(f"has the key of {seen[row['key']]}")
                except TROUBLE as error:
                    reason = str(error) if isinstance(error, Unusable) else f"cannot be read: {error!r}"
                    report.failures.append(Failure(uri, "index", reason))
                    tally.dropped[reason] += 1
                    continue
                seen[row["key"]] = uri
                rows.append(row)
                captions += [caption_row(row["key"], text) for text in texts]
                count(totals, histograms, row)
                tally.left += 1
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        shards.append(Shard(path.name, path.stat().st_size, len(rows) - before, digest))
    report.seconds = totals["seconds"] = round(totals["seconds"], 6)
    return Packed(tuple(shards), totals, ordered(histograms)), rows, captions


def groups(path: Path, report: Report) -> Iterator[Group]:
    """Yield the samples of a tar: adjacent members whose names agree up to the first dot of the file name."""
    group = Group("")
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or "." not in (base := Path(member.name).name):
                    continue
                stem, _, ext = base.partition(".")
                name = f"{Path(member.name).parent.as_posix()}/{stem}".removeprefix("./")
                if name != group.name:
                    if group.members:
                        yield group
                    group = Group(name)
                if member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                group.members[ext.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        reason = "is not a tar" if not group.name else f"is cut off or damaged after {group.name}"
        report.failures.append(Failure(path.name, "index", f"{reason} ({error})"))
    if group.members:
        yield group


def describe(path: Path, group: Group, file: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the manifest row of a sample, and its captions where they are not in a K.json of ours.

    Raises:
        Unusable: it has no media member, or one that cannot be used as it is.
    """
    ext = next((ext for ext in group.members if ext in VIDEOS | IMAGES), None)
    if ext is None:
        raise Unusable(f"has no video or image, only {', '.join(sorted(group.members))}")

    def content(member: str) -> bytes:
        offset, length = group.members[member]
        file.seek(offset)
        return file.read(length)

    media = content(ext)
    offset, length = group.members[ext]
    place = {"shard": path.name, "media_offset": offset, "media_length": length, "crc32": zlib.crc32(media)}
    place["json_offset"], place["json_length"] = group.members.get("json", (offset, 0))
    record = json.loads(content("json")) if "json" in group.members else {}
    if ours(record, group.name):
        video = record["video"]
        kind = "video" if ext == "mp4" else "image"
        facts = {"key": record["key"], "kind": kind, "w": video["w"], "h": video["h"], "frames": video["frames"]}
        rate = Fraction(*video["fps"])
        scores, texts = record["scores"], []
    else:
        name = f"{path.name}\x1f{group.name}".encode()
        facts, rate = look(media)
        facts["key"] = hashlib.blake2b(name, digest_size=16).hexdigest()
        texts = [" ".join(content("txt").decode("utf-8").split())] if "txt" in group.members else texts_in(record)
        scores = {}
    rates = {"fps_num": rate.numerator, "fps_den": rate.denominator}
    return place | facts | rates | {"ext": ext, "scores": dumps(scores)}, [text for text in texts if text]


def ours(record: Any, name: str) -> bool:
    """Return whether a K.json was written by data_prep."""
    return (
        isinstance(record, dict) and record.get("schema") == SCHEMA and bool(KEY.fullmatch(name)) and "prep" in record
    )


def look(media: bytes) -> tuple[dict[str, Any], Fraction]:
    """Return kind, size and frame count of a media member, and its rate, by decoding all of it.

    Raises:
        Unusable: it cannot be decoded, or is stored turned, which the loader would not see.
    """
    damages: list[str] = []
    try:
        container = av.open(io.BytesIO(media), "r")
    except av.FFmpegError as error:
        raise Unusable("its media member is not a video or image that FFmpeg can read") from error
    with container:
        stream = video_stream(container)
        frames, turn, width, height = 0, UPRIGHT, 0, 0
        for frame in decoded(container, stream, damages.append):
            if frames == 0:
                turn, width, height = turn_of(frame), frame.width, frame.height
            frames += 1
        rate = Fraction(stream.average_rate or stream.guessed_rate or 1).limit_denominator(1001)
    if damages or not frames:
        raise Unusable(damages[0] if damages else "no frame could be decoded")
    if turn != UPRIGHT:
        raise Unusable("is stored turned; make new shards of it with task=build")
    kind = "image" if stream.codec_context.name in ("mjpeg", "png", "webp") and frames == 1 else "video"
    return {"kind": kind, "w": width, "h": height, "frames": frames}, rate if kind == "video" else Fraction(1)


def caption_row(key: str, text: str) -> dict[str, str]:
    """Return a row of the caption table."""
    return {"key": key, "type": "gt", "text": text, "model": "", "rev": "", "lang": ""}
