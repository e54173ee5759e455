"""Captions that stand beside a file, on disk or in a tar: `clip.txt`, `clip.json`, or only the words of its name."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path, PurePath

from data_prep.members import File
from data_prep.pack import Report
from data_prep.records import FROM_NAME, Caption, Failure

ENDINGS = (".txt", ".json")
CAMERA_NAMES = frozenset(("IMG", "VID", "MOV", "DSC", "DSCN", "PXL", "GOPR", "CLIP", "VIDEO", "UNTITLED"))


def beside(path: Path) -> list[Path]:
    """Return the files beside one that hold captions of it: `clip.txt` is one, `clip.json` has them."""
    found = (path.with_suffix(ending) for ending in ENDINGS)
    return [item for item in found if item != path and item.is_file()]


def captions_of(files: Iterable[File], uri: str, report: Report) -> list[Caption]:
    """Return the captions in the text and JSON files that belong to `uri`; one that cannot be read is reported."""
    found, wrong = read_captions(files)
    for name, why in wrong:
        reason = f"the caption beside it, {name}, cannot be read: {why}"
        report.failures.append(Failure(uri, "ingest", reason, used="the file without that caption"))
    return found


def read_captions(files: Iterable[File]) -> tuple[list[Caption], list[tuple[str, str]]]:
    """Return the captions in text and JSON files, and (name, why) of each file that cannot be read."""
    found: list[Caption] = []
    wrong = []
    for file in files:
        try:
            text = file.read_bytes().decode("utf-8")
            here = captions_in(json.loads(text)) if file.suffix.lower() == ".json" else [Caption("gt", plain(text))]
            found += [caption for caption in here if caption.text]
        except (OSError, ValueError, RecursionError) as error:
            wrong.append((PurePath(file.name).name, why_not(error)))
    return found, wrong


def why_not(error: Exception) -> str:
    """Return why a caption cannot be read, in words that are the same wherever in its file it goes wrong."""
    match error:
        case OSError():
            return error.strerror or str(error)
        case json.JSONDecodeError():
            return "it is not JSON"
        case UnicodeDecodeError():
            return "it is not UTF-8"
        case UnicodeEncodeError():
            return "it has half a character (a lone surrogate)"
        case RecursionError():
            return "it is nested too deeply"
    return str(error)


def captions_in(value: object) -> list[Caption]:
    """Return the captions in a JSON object: one string, or a list of strings or of objects with `type` and `text`.

    Of `captions`, `caption` and `text` the first that is there and not null is taken.

    Raises:
        ValueError: it is no object, or its caption is something else.
    """
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    found: object = next((value[name] for name in ("captions", "caption", "text") if value.get(name) is not None), [])
    return [caption_in(item) for item in (found if isinstance(found, list) else [found])]


def caption_in(item: object) -> Caption:
    """Return one caption of a JSON object."""
    if isinstance(item, str):
        return Caption("gt", plain(item))
    if isinstance(item, dict) and isinstance(item.get("type"), str) and isinstance(item.get("text"), str):
        rest = {name: item[name] for name in ("model", "rev", "lang") if isinstance(item.get(name), str)}
        return Caption(item["type"], plain(item["text"]), **rest)
    raise ValueError("its caption is not a string")


def texts_in(value: object) -> list[str]:
    """Return the texts of `captions_in(value)`."""
    return [caption.text for caption in captions_in(value)]


def plain(text: str) -> str:
    """Return a text in one line. Raises ValueError where it is none: half of a pair of UTF-16, which JSON lets pass."""
    text.encode("utf-8")
    return " ".join(text.split())


def from_name(path: File) -> tuple[Caption, ...]:
    """Return the words of a file's name as its caption, for want of a better one; none where it holds no word.

    `train_running.mp4` says something, `IMG_20210304.mp4` and `a3f09c.mp4` do not: what holds a digit is no word.
    """
    parts = re.split(r"[\s_.+-]+", unicodedata.normalize("NFC", path.stem))
    words = [part for part in parts if part.isalpha() and (len(part) > 2 or not part.isascii())]
    if not words or words[0].upper() in CAMERA_NAMES:
        return ()
    return (Caption("gt", " ".join(words), model=FROM_NAME),)
