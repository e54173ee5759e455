"""Input of any form to a list of sources, each with its captions: a folder, a glob, a list, one file, or tars."""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from data_prep.captioned import captioned
from data_prep.captions import NONE, Captions, Columns, found_in, read
from data_prep.kinds import IMAGES, VIDEOS, kind_of
from data_prep.members import Member
from data_prep.pack import Report
from data_prep.records import Source
from data_prep.sidecars import ENDINGS, beside, captions_of, from_name
from data_prep.tars import tar_sources
from soratrain.errors import DataError

ALL = Columns()


def find(where: str, report: Report, captions: str | None = None, columns: Columns = ALL) -> tuple[list[Source], str]:
    """Return the sources that `where` names, in a fixed order, and a hash of their names, sizes and captions.

    A folder is searched with all below it; files whose names are not of a video, image or tar are left out and counted.
    Files that a list names are taken whatever their names. Hidden files are left out.

    Args:
        captions: a table of captions, or `none`; without it the one that a folder brings along is taken.

    Raises:
        DataError: there is no such input, or nothing in it to use; the table cannot be read or names none of it.
    """
    tally = report.tally("ingest", "files")
    path = Path(where)
    said = table_of(path, captions, columns)
    if path.is_dir():
        named = [(str(item.relative_to(path)), item) for item in walk(path) if not same(item, said)]
        listed = False
    elif path.is_file() and path.suffix.lower() == ".txt":
        named, listed = read_list(path), True
    elif path.is_file():
        named, listed = [(path.name, path)], True
    elif path.exists():
        raise DataError(f"input={where} is neither a folder nor a file")
    elif glob.has_magic(where):
        named = [(item, Path(item)) for item in sorted(glob.glob(where, recursive=True)) if Path(item).is_file()]
        listed = False
        if not named:
            raise DataError(f"input={where} matches no file; check the pattern, and quote it in the shell")
    else:
        raise DataError(f"input={where} does not exist; give a folder, a glob, a list file (.txt), or input=world")
    sources = [source for uri, item in sorted(named) for source in sources_of(uri, item, listed, report)]
    if not sources and (path / "dataset.json").is_file():
        tars = path / "*.tar"
        raise DataError(f"input={where} is finished shards (dataset.json); to build from its tars, give input='{tars}'")
    if not sources:
        what = "is an empty list" if path.suffix.lower() == ".txt" else "holds no videos or images"
        first = f"; {report.failures[0].uri}: {report.failures[0].reason}" if report.failures else ""
        raise DataError(f"input={where} {what}; known names end in .{', .'.join(sorted(VIDEOS | IMAGES))}, .tar{first}")
    if said is not None:
        sources, report.captions = captioned(sources, said, where)
        tally.how[f"with captions from {said.path.name}"] = report.captions.files
    digest = hashlib.blake2b(digest_size=8)
    for source in sources:
        digest.update(f"{source.uri}\x1f{bytes_of(source)}\x1f{source.captions}\x1e".encode("utf-8", "replace"))
    tally.entered = tally.left = len(sources)
    return sources, digest.hexdigest()


def files_hash(sources: Sequence[Source]) -> str:
    """Return a hash of the sources without their captions; nothing where two have one name."""
    if len({source.uri for source in sources}) < len(sources):
        return ""
    digest = hashlib.blake2b(digest_size=8)
    for source in sources:
        digest.update(f"{source.uri}\x1f{bytes_of(source)}\x1e".encode("utf-8", "replace"))
    return digest.hexdigest()


def sources_of(uri: str, path: Path, listed: bool, report: Report) -> Iterator[Source]:
    """Yield what a file of the input is, or what is in it; one that is neither video, image nor tar is counted."""
    uri = os.fsencode(uri).decode("utf-8", "replace")
    kind = kind_of(path, listed)
    if path.suffix.lower() == ".tar":
        yield from tar_sources(path, uri, report)
    elif kind is not None:
        yield Source(uri, path, kind, tuple(captions_of(beside(path), uri, report)) or from_name(path))
    elif path.suffix.lower() not in ENDINGS:
        report.tally("ingest", "files").how["left out, not video or image"] += 1


def table_of(path: Path, captions: str | None, columns: Columns) -> Captions | None:
    """Return what the table of captions says that was asked for, or that the folder `path` brings along."""
    if captions is not None:
        return None if captions == NONE else read(Path(captions), columns)
    try:
        found = found_in(path, columns)
        return None if found is None else read(found, columns)
    except DataError as error:
        raise DataError(f"{error}; captions={NONE} builds without it") from error


def same(path: Path, table: Captions | None) -> bool:
    """Return whether a file is the table."""
    return table is not None and path.name == table.path.name and path.samefile(table.path)


def bytes_of(source: Source) -> int:
    """Return how long a source's file is; -1 where there is none."""
    if isinstance(source.path, Member):
        return source.path.length
    return source.path.stat().st_size if source.path.is_file() else -1


def walk(folder: Path) -> Iterator[Path]:
    """Yield the files below a folder, following links to folders once each; hidden ones and our own are left out."""
    seen = {folder.resolve()}
    for parent, folders, files in os.walk(folder, followlinks=True):
        here = Path(parent)
        if (here / "dataset.json").is_file() and any(name.endswith(".tar") for name in files):
            folders.clear()
            continue
        kept = []
        for name in sorted(folders):
            real = (here / name).resolve()
            if not name.startswith(".") and real not in seen:
                seen.add(real)
                kept.append(name)
        folders[:] = kept
        yield from (here / name for name in sorted(files) if not name.startswith("."))


def read_list(path: Path) -> list[tuple[str, Path]]:
    """Return (line, path) for every line of a list; a relative path is from the list's folder, else from ours."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # Unicode has more ends of lines, which names may hold
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"input={path} cannot be read as a list (UTF-8 text, one path a line): {error}") from error
    named = {}
    for line in lines:
        if line.strip():
            beside = path.parent / line.strip()
            named[line.strip()] = beside if beside.exists() or not Path(line.strip()).exists() else Path(line.strip())
    return list(named.items())
