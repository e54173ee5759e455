"""Input of any form to a list of sources: a folder, a glob, a list file, or one file; with the captions beside them."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from data_prep.pack import Report
from data_prep.records import FROM_NAME, Caption, Failure, Kind, Source
from soratrain.errors import DataError

VIDEOS = frozenset(
    ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m2v", "ts", "m2ts", "mts", "wmv", "asf")
    + ("flv", "f4v", "ogv", "3gp", "3g2", "mxf", "y4m", "gif")
)
IMAGES = frozenset(("jpg", "jpeg", "png", "webp"))
CAPTIONS = (".txt", ".json")
CAMERA_NAMES = frozenset(("IMG", "VID", "MOV", "DSC", "DSCN", "PXL", "GOPR", "CLIP", "VIDEO", "UNTITLED"))


def find(where: str, report: Report) -> tuple[list[Source], str]:
    """Return the sources that `where` names, in a fixed order, and a hash of their names and sizes.

    A folder is searched with all below it; files whose names are not of a video or image are left out and counted.
    Files that a list names are taken whatever their names. Hidden files are left out.

    Raises:
        DataError: there is no such input, or nothing in it to use.
    """
    tally = report.tally("ingest", "files")
    path = Path(where)
    if path.is_dir():
        named = [(str(item.relative_to(path)), item) for item in walk(path)]
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
    sources = []
    digest = hashlib.blake2b(digest_size=8)
    for uri, item in sorted(named):
        uri = os.fsencode(uri).decode("utf-8", "replace")
        kind = kind_of(item, listed)
        if kind is None:
            if item.suffix.lower() not in CAPTIONS:
                tally.how["other files left out"] += 1
            continue
        captions = tuple(sidecars(item, uri, report)) or from_name(item)
        size = item.stat().st_size if item.is_file() else -1
        digest.update(f"{uri}\x1f{size}\x1f{captions}\x1e".encode("utf-8", "replace"))
        sources.append(Source(uri, item, kind, captions))
    if not sources:
        what = "is an empty list" if path.is_file() else "holds no videos or images"
        raise DataError(f"input={where} {what}; known names end in .{', .'.join(sorted(VIDEOS | IMAGES))}")
    tally.entered = tally.left = len(sources)
    return sources, digest.hexdigest()


def kind_of(path: Path, listed: bool) -> Kind | None:
    """Return what a file's name says it is; a listed file with another name is taken for a video."""
    ending = path.suffix.lower().removeprefix(".")
    if ending in IMAGES:
        return "image"
    return "video" if ending in VIDEOS or listed else None


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
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"input={path} cannot be read as a list (UTF-8 text, one path a line): {error}") from error
    named = {}
    for line in lines:
        if line.strip():
            beside = path.parent / line.strip()
            named[line.strip()] = beside if beside.exists() or not Path(line.strip()).exists() else Path(line.strip())
    return list(named.items())


def sidecars(path: Path, uri: str, report: Report) -> Iterator[Caption]:
    """Yield the captions beside a file: `clip.txt` is one, `clip.json` holds `caption` or `captions`."""
    for suffix, read in zip(CAPTIONS, (read_text, read_json), strict=True):
        beside = path.with_suffix(suffix)
        if beside == path or not beside.is_file():
            continue
        try:
            yield from (Caption("gt", caption) for caption in read(beside) if caption)
        except (OSError, ValueError) as error:
            reason = f"the caption beside it, {beside.name}, cannot be read: {str(error).splitlines()[0]}"
            report.failures.append(Failure(uri, "ingest", reason, used="the file without that caption"))


def from_name(path: Path) -> tuple[Caption, ...]:
    """Return the words of a file's name as its caption, for want of a better one; none where it holds no word.

    `train_running.mp4` says something, `IMG_20210304.mp4` and `a3f09c.mp4` do not: what holds a digit is no word.
    """
    parts = re.split(r"[\s_.+-]+", unicodedata.normalize("NFC", path.stem))
    words = [part for part in parts if part.isalpha() and (len(part) > 2 or not part.isascii())]
    if not words or words[0].upper() in CAMERA_NAMES:
        return ()
    return (Caption("gt", " ".join(words), model=FROM_NAME),)


def read_text(path: Path) -> list[str]:
    """Return the one caption that a text file is."""
    return [" ".join(path.read_text(encoding="utf-8").split())]


def read_json(path: Path) -> list[str]:
    """Return the captions of a JSON object beside a file."""
    return texts_in(json.loads(path.read_text(encoding="utf-8")))


def texts_in(value: object) -> list[str]:
    """Return the captions in a JSON object: `caption` or `text`, one string, or `captions`, a list of strings."""
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    found = value.get("captions", value.get("caption", value.get("text", [])))
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list) or not all(isinstance(item, str) for item in found):
        raise ValueError("its caption is not a string")
    return [" ".join(item.split()) for item in found]
