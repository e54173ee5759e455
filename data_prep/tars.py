"""Foreign WebDataset tars (video2dataset's, say) as input: each sample's media is a source, read where it lies.

The members of a sample are adjacent and have one name up to the first dot: `K.mp4`, `K.txt`, `K.json`. A tar that is
cut off or damaged costs what is damaged: reading goes on at the next header that can be read.
"""

from __future__ import annotations

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from data_prep.kinds import kind_of
from data_prep.media import Unusable, length_of
from data_prep.members import Member
from data_prep.pack import Report
from data_prep.records import Failure, Kind, Source
from data_prep.sidecars import ENDINGS, captions_of, from_name

BLOCK = tarfile.BLOCKSIZE
PART = 2048 * BLOCK  # bytes looked at at once
HEADER = 3 * BLOCK  # what one member has at most where its name is short: two blocks of PAX, and its own
COMPRESSED = {
    b"\x1f\x8b": ("gzip", "rename it to .tar.gz and gunzip it"),
    b"\x28\xb5\x2f\xfd": ("zstd", "rename it to .tar.zst and unzstd it"),
    b"BZh": ("bzip2", "bunzip2 it"),
    b"\xfd7zXZ\0": ("xz", "rename it to .tar.xz and unxz it"),
}
TROUBLE = (tarfile.TarError, ValueError, OverflowError, IndexError)


@dataclass
class Group:
    """The members of one sample by what follows the first dot of their names, in lower case.

    `repeats` is the ending that the sample before has as well, of the same name: where a member stands twice, another
    sample is taken to begin, or it could get what belongs to the first.
    """

    name: str
    repeats: str = ""
    members: dict[str, Member] = field(default_factory=dict)


def tar_sources(path: Path, uri: str, report: Report) -> Iterator[Source]:
    """Yield the media of a tar's samples as sources, each with its captions; `report` is told what cannot be used."""
    for group in groups(path, uri, report):
        kinds = {ending: kind_of(member, listed=False) for ending, member in group.members.items()}
        kind: Kind = "video" if "video" in kinds.values() else "image"
        media = [ending for ending, found in kinds.items() if found == kind]
        if not media:
            reason = f"has no video or image, only {', '.join(sorted(group.members))}"
            report.failures.append(Failure(f"{uri}/{group.name}", "ingest", reason))
        for ending in media:
            member = group.members[ending]
            name = f"{uri}/{member.name}"
            captions = captions_of(texts(group, ending, alone=len(media) == 1), name, report)
            yield Source(name, member, kind, tuple(dict.fromkeys(captions)) or from_name(member))


def texts(group: Group, media: str, *, alone: bool) -> list[Member]:
    """Return the members that hold captions of one of a sample's media: of the same name, or of the whole sample."""
    inner = media.rpartition(".")[0]
    found = []
    for ending in ENDINGS:
        names = [inner + ending] if inner else [ending[1:]]
        names += [ending[1:]] if alone and inner else []
        found += [group.members[name] for name in names if name in group.members][:1]
    return found


def groups(path: Path, uri: str, report: Report, step: str = "ingest") -> Iterator[Group]:
    """Yield the samples of a tar; `report` is told, as of `step`, what cannot be read."""
    group = Group("")
    for member in members(path, uri, report, step):
        base = PurePosixPath(member.name).name
        stem, dot, ending = base.partition(".")
        if not stem or not dot:  # hidden, or without an ending
            continue
        name = (PurePosixPath(member.name).parent / stem).as_posix()
        if name != group.name or ending.lower() in group.members:
            if group.members:
                yield group
            group = Group(name, ending.lower() if name == group.name else "")
        group.members[ending.lower()] = member
    if group.members:
        yield group


def members(path: Path, uri: str, report: Report, step: str) -> Iterator[Member]:
    """Yield the files in a tar that are whole; `report` is told of what is damaged, and of what is no tar at all."""
    damage: list[int] = []
    empty = True

    def failed(name: str, reason: str, used: str = "") -> None:
        report.failures.append(Failure(name, step, reason, used))

    try:
        size = length_of(path)
        for header in headers(path, size, damage):
            empty = False
            name = os.fsencode(header.name.removeprefix("./")).decode("utf-8", "replace")
            there = size - header.offset_data
            if header.size > there:
                failed(f"{uri}/{name}", f"the tar is cut off in the middle of it, after {there} of {header.size} bytes")
            elif header.issparse():
                failed(f"{uri}/{name}", "is stored with holes; make the tar without --sparse")
            elif header.isfile():
                yield Member(path, name, header.offset_data, header.size)
    except (Unusable, OSError) as error:
        failed(uri, str(error) if isinstance(error, Unusable) else f"cannot be read: {error.strerror}")
        return
    if empty:
        failed(uri, why_no_tar(path) if damage else "is an empty tar")
    elif damage and size - damage[0] < HEADER:
        failed(uri, f"is cut off in the middle of a header, after byte {damage[0]}", "what comes before")
    elif damage:
        rest = len(damage) - 1
        more = f" and in {rest} more place{'s' if rest > 1 else ''}" if rest else ""
        failed(uri, f"is damaged at byte {damage[0]}{more}", "what can be read")


def why_no_tar(path: Path) -> str:
    """Return why nothing in a file can be read as a tar."""
    with open(path, "rb") as file:
        start = file.read(8)
    for magic, (name, mend) in COMPRESSED.items():
        if start.startswith(magic):
            return f"is compressed with {name}, in which nothing can be found by its place; {mend}"
    return "is not a tar"


def headers(path: Path, size: int, damage: list[int]) -> Iterator[tarfile.TarInfo]:
    """Yield the headers of a tar that can be read; `damage` is told where something else stands than there should.

    Every header has a checksum, so that the next one is found again behind damage, and behind the end of a tar to which
    another was appended.
    """
    with open(path, "rb") as file:
        place = 0  # of the next header, where all is well
        start = 0  # of what is not read yet
        while start < size:
            file.seek(start)
            try:
                tar = tarfile.TarFile(fileobj=file, ignore_zeros=True)
                for header in tar:
                    if tar.offset <= header.offset:
                        raise tarfile.ReadError("a negative size")
                    if any_in(file, place, header.offset):
                        damage.append(place)
                    yield header
                    place = start = tar.offset
                break
            except TROUBLE:
                start = max(start + BLOCK, -(-file.tell() // BLOCK) * BLOCK)
        if any_in(file, place, size):
            damage.append(place)


def any_in(file: BinaryIO, start: int, stop: int) -> bool:
    """Return whether any byte of [start, stop) is not zero."""
    while start < stop:
        file.seek(start)
        part = file.read(min(PART, stop - start))
        if part.count(0) < len(part):
            return True
        start += len(part) or PART
    return False
