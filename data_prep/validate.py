"""task=validate: is a finished folder what its tables say? Everything that is wrong is listed with its place.

Checksums, tar structure, order and pairs of members, JSON, offsets, sizes and frame counts (by decoding) are looked at,
over all cores, for what data_prep has built, selected, repacked or indexed. Nothing in the folder is written.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from data_prep.indexed import look, ours
from data_prep.media import Unusable
from data_prep.members import Member
from data_prep.schema import PrepConfig, hash_of
from soratrain.amounts import counted
from soratrain.data.atomic import replacing
from soratrain.data.caption_table import read_original_captions
from soratrain.data.members import json_object
from soratrain.data.reading import read_table
from soratrain.data.shards import KEY
from soratrain.errors import DataError

SHOWN = 40  # problems in the table on the terminal
SAMPLED = 16  # decode=sample takes one clip of so many
PART = 1 << 22  # bytes read at once for a checksum
Row = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong: in which file, of which sample (or none), at which byte (or -1), and what."""

    file: str
    what: str
    key: str = ""
    offset: int = -1


@dataclass
class Layout:
    """The members of a tar: (offset of the bytes, length) by name, the order of stems, and what is wrong with it."""

    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    stems: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def validate(config: PrepConfig, console: Console) -> None:
    """Check the folder that `input` names and print what is wrong.

    Raises:
        DataError: it is no finished folder, or something in it is wrong.
    """
    folder = Path(config.input)
    problems, samples = list(check(folder, config.validate.decode, config.processes)), 0
    samples = len(read_table(folder)) if not any(item.file == "manifest" for item in problems) else 0
    if config.validate.report:
        with replacing(Path(config.validate.report)) as temporary:
            temporary.write_text(json.dumps([asdict(item) for item in problems], indent=1) + "\n", encoding="utf-8")
    if not problems:
        console.print(
            f"{folder}: {counted(samples, 'samples')}, nothing wrong (validate.decode={config.validate.decode})"
        )
        return
    table = Table(title=f"{folder}: {counted(len(problems), 'problems')}", title_justify="left")
    for name in ("file", "sample", "byte", "what is wrong"):
        table.add_column(name, justify="right" if name == "byte" else "left", overflow="fold")
    for item in problems[:SHOWN]:
        table.add_row(item.file, item.key, "" if item.offset < 0 else str(item.offset), item.what)
    console.print(table)
    more = f"; {len(problems) - SHOWN} more: list all with validate.report=FILE" if len(problems) > SHOWN else ""
    first = problems[0]
    raise DataError(
        f"input={config.input}: {counted(len(problems), 'problems')}, the first in {first.file}: {first.what}{more}"
    )


def check(folder: Path, decode: str, processes: int) -> Iterator[Problem]:
    """Yield what is wrong with a folder.

    Raises:
        DataError: there is no folder, or no finished one.
    """
    if not folder.is_dir():
        raise DataError(f"input={folder} {'is no folder' if folder.exists() else 'does not exist'}")
    try:
        dataset = json.loads((folder / "dataset.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            f"input={folder}: has no readable dataset.json ({error}), so no task has finished it"
        ) from error
    if "settings" in dataset and dataset.get("config_hash") != hash_of(dataset["settings"]):
        yield Problem("dataset.json", "config_hash is not that of its settings: it was edited, or is of another build")
    try:
        rows = read_table(folder).to_pylist()
    except DataError as error:
        yield Problem("manifest", str(error))
        return
    if len(rows) != dataset.get("totals", {}).get("samples"):
        told = dataset.get("totals", {}).get("samples")
        yield Problem(
            "manifest", f"holds {counted(len(rows), 'samples')}, dataset.json tells of {told}: it is of another build"
        )
    keys = {row["key"] for row in rows}
    for key in sorted({row["key"] for row in read_original_captions(folder)} - keys):
        yield Problem("captions", "a caption of a sample that is not in the manifest", key)
    by_shard: dict[str, list[Row]] = {entry["name"]: [] for entry in dataset.get("shards", [])}
    for row in rows:
        by_shard.setdefault(row["shard"], []).append(row)
    told = {entry["name"]: entry for entry in dataset.get("shards", [])}
    for path in sorted(folder.glob("*.tar")):
        if path.name not in by_shard:
            yield Problem(path.name, "is a shard that dataset.json does not know")
    whole = dataset.get("settings", {}).get("task", "build") not in ("select", "index")
    work = partial(check_shard, folder, decode=decode, whole=whole)
    jobs = [(name, told.get(name), by_shard[name]) for name in sorted(by_shard)]
    with ProcessPoolExecutor(min(processes, len(jobs) or 1), mp_context=multiprocessing.get_context("spawn")) as pool:
        for found in pool.map(work, jobs):
            yield from found


def check_shard(folder: Path, job: tuple[str, Row | None, Sequence[Row]], *, decode: str, whole: bool) -> list[Problem]:
    """Return what is wrong with one shard.

    Args:
        job: its name, what dataset.json tells of it, and the manifest's rows of it.
        decode: `all`, `sample` or `none`.
        whole: every sample in it must be in the manifest.
    """
    name, told, rows = job
    path = folder / name
    if not path.is_file():
        return [Problem(name, "is not there")]
    problems = [] if told else [Problem(name, "dataset.json does not know it")]
    if told and path.stat().st_size != told["bytes"]:
        problems.append(Problem(name, f"has {path.stat().st_size} bytes, dataset.json tells of {told['bytes']}"))
    elif told and sha256(path) != told["sha256"]:
        problems.append(Problem(name, "its SHA-256 is not the one in dataset.json: its bytes have changed"))
    layout = laid_out(path)
    problems += layout.problems
    with open(path, "rb") as file:
        for row in rows:
            chosen = decode == "all" or (decode == "sample" and int(row["key"][:8], 16) % SAMPLED == 0)
            problems += (Problem(name, what, row["key"], at) for at, what in check_row(file, row, layout, chosen))
    stems = {stem_of(row, layout) for row in rows}
    if whole:
        problems += (Problem(name, "is in the shard, not in the manifest", stem) for stem in {*layout.stems} - stems)
    return sorted(problems, key=lambda item: (item.offset, item.key, item.what))


def laid_out(path: Path) -> Layout:
    """Return the members of a tar, and what is wrong with its structure, order and pairs."""
    layout, name = Layout(), path.name
    with open(path, "rb") as file:
        if file.read(2) == b"\x1f\x8b":
            layout.problems.append(Problem(name, "is gzip, in which nothing can be found by offset: gunzip it"))
            return layout
    seen: set[str] = set()
    exts: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                stem, _, ext = member.name.partition(".")
                if member.offset_data + member.size > path.stat().st_size:
                    raise tarfile.ReadError("unexpected end of data")
                if not layout.stems or layout.stems[-1] != stem:
                    if stem in seen:
                        what = "its members are not adjacent, or its key occurs twice in this shard"
                        layout.problems.append(Problem(name, what, stem, member.offset))
                    seen.add(stem)
                    layout.stems.append(stem)
                    exts = []
                if ext == "json" and exts and KEY.fullmatch(stem):  # another's order is its own
                    layout.problems.append(Problem(name, "its JSON comes after its media", stem, member.offset))
                exts.append(ext)
                layout.members[member.name] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        after = f"cut off or damaged after {layout.stems[-1]}" if layout.stems else "not a tar"
        layout.problems.append(Problem(name, f"is {after} ({error})"))
    return layout


def stem_of(row: Row, layout: Layout) -> str:
    """Return the name under which a row's media lies in its shard; its key where nothing lies there."""
    place = (row["media_offset"], row["media_length"])
    found = (name.partition(".")[0] for name, where in layout.members.items() if where == place)
    return row["key"] if f"{row['key']}.{row['ext']}" in layout.members else next(found, row["key"])


def check_row(file: Any, row: Row, layout: Layout, decode: bool) -> Iterator[tuple[int, str]]:
    """Yield (offset, what is wrong) of one sample; `file` is its shard."""
    at, length = row["media_offset"], row["media_length"]
    name = f"{row['key']}.{row['ext']}"
    if name in layout.members and layout.members[name] != (at, length):
        yield at, f"the manifest has its media at byte {at}, the shard at {layout.members[name][0]}: a stale manifest"
        return
    file.seek(at)
    media = file.read(length)
    if len(media) < length:
        yield at, "the shard ends before its media does"
        return
    if zlib.crc32(media) != row["crc32"]:
        yield at, "its bytes are not those that the manifest knows (CRC-32)"
        return
    if row["json_length"]:
        file.seek(row["json_offset"])
        yield from ((row["json_offset"], what) for what in check_record(file.read(row["json_length"]), row))
    if decode:
        try:
            rate = Fraction(row["fps_num"], row["fps_den"])
            facts, _ = look(Member(Path(file.name), name, at, length), rate)
        except (Unusable, ValueError, ArithmeticError) as error:
            yield at, f"cannot be decoded: {error}"
            return
        wrong = [f"{key} {facts[key]}, not {row[key]}" for key in ("w", "h", "frames") if facts[key] != row[key]]
        if wrong:
            yield at, f"decodes to {', '.join(wrong)} as the manifest has it"


def check_record(text: bytes, row: Row) -> Iterator[str]:
    """Yield what is wrong with a sample's K.json."""
    try:
        record = json_object(text)
    except DataError as error:
        yield str(error)
        return
    if not ours(record, row["key"]):
        if "prep" in record and record.get("key") != row["key"]:
            yield f"its JSON is of sample {record.get('key')}"
        return
    video = record.get("video")
    told = video if isinstance(video, dict) else {}
    wrong = [f"{key} {told.get(key)}, not {row[key]}" for key in ("w", "h", "frames") if told.get(key) != row[key]]
    if wrong:
        yield f"its JSON says {', '.join(wrong)} as the manifest has it"


def sha256(path: Path) -> str:
    """Return a file's SHA-256 in hex."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(PART):
            digest.update(part)
    return digest.hexdigest()
