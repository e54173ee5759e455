"""What a file's name says that it is."""

from __future__ import annotations

from data_prep.members import File
from data_prep.records import Kind

VIDEOS = frozenset(
    ("mp4", "m4v", "mov", "mkv", "webm", "avi", "mpg", "mpeg", "m2v", "ts", "m2ts", "mts", "wmv", "asf")
    + ("flv", "f4v", "ogv", "3gp", "3g2", "mxf", "y4m", "gif")
)
IMAGES = frozenset(("jpg", "jpeg", "png", "webp"))


def kind_of(path: File, listed: bool) -> Kind | None:
    """Return what a file's name says it is; a listed file with another name is taken for a video."""
    ending = path.suffix.lower().removeprefix(".")
    if ending in IMAGES:
        return "image"
    return "video" if ending in VIDEOS or listed else None
