"""Which file a name in a table means: by its path, else by a part of it, where only one file and one name have that.

A caption on the wrong clip is worse than none. So a part of a path counts only where it is unique on both sides.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from posixpath import basename, normpath, splitext
from typing import TypeVar
from urllib.parse import unquote, urlsplit

from data_prep.kinds import IMAGES, VIDEOS
from data_prep.members import Member
from data_prep.records import Source

ENDING = re.compile(rf"\.({'|'.join(sorted(VIDEOS | IMAGES))})$", re.IGNORECASE)
WHOLE = "relative path"
Item = TypeVar("Item")


def match(names: Iterable[str], sources: Sequence[Source], folder: Path) -> dict[str, tuple[int, str]]:
    """Return which source each name means, by its number, and by what it is known; nothing of a name that is unsure.

    Args:
        names: as `cleaned` gives them.
        folder: of the table, from which its paths may be; they may be from the input too, or from where we are.
    """
    names = [name for name in dict.fromkeys(names) if name]
    uris = [cleaned(source.uri) for source in sources]
    places = [cleaned(place_of(source)) for source in sources]
    ways: list[tuple[str, list[str], Callable[[str], str]]] = [
        (WHOLE, uris, str),
        (WHOLE, places, lambda name: cleaned(os.path.abspath(folder / name))),
        (WHOLE, places, lambda name: cleaned(os.path.abspath(name))),
        ("stem", [splitext(uri)[0] for uri in uris], bare),
        ("base name", [basename(uri) for uri in uris], basename),
        ("stem", [splitext(basename(uri))[0] for uri in uris], lambda name: bare(basename(name))),
    ]
    found: dict[str, tuple[int, str]] = {}
    for how, keys, key_of in ways:
        ours, theirs = groups(enumerate(keys)), groups((name, key_of(name)) for name in names)
        for key, group in theirs.items():
            if len(ours.get(key, ())) == 1 and (len(group) == 1 or how == WHOLE):
                for name in group:
                    found.setdefault(name, (ours[key][0], how))
    return found


def groups(pairs: Iterable[tuple[Item, str]]) -> dict[str, list[Item]]:
    """Return the items of each key."""
    found: dict[str, list[Item]] = defaultdict(list)
    for item, key in pairs:
        found[key].append(item)
    return found


def bare(name: str) -> str:
    """Return a name without its ending, if that is of a video or an image: `17.5` has none."""
    return ENDING.sub("", name)


def cleaned(name: str) -> str:
    """Return a name in one form: the path of a URL, `/` for a backslash, no `.` and `..`, composed letters (NFC)."""
    name = name.strip()
    if "://" in name:
        name = unquote(urlsplit(name).path)
    name = unicodedata.normalize("NFC", name.replace("\\", "/"))
    return normpath(name) if name else ""


def place_of(source: Source) -> str:
    """Return where a source lies; what is in a tar as if the tar were a folder."""
    path = source.path
    return os.path.abspath(path.tar / path.name if isinstance(path, Member) else path)
