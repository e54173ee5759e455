"""What can be said about a clip of the world: the vocabulary, and the record that truth, oracle and captions share."""

from __future__ import annotations

from dataclasses import dataclass

# Object colours differ in hue, backgrounds are muted, so that neither is ever taken for the other.
COLORS = {
    "red": (226, 44, 44),
    "green": (44, 170, 62),
    "blue": (48, 92, 240),
    "yellow": (244, 206, 36),
    "purple": (182, 60, 220),
    "cyan": (40, 202, 222),
}
BACKGROUNDS = {
    "black": (14, 14, 16),
    "white": (240, 240, 238),
    "grey": (126, 126, 128),
    "navy": (26, 32, 92),
}
SHAPES = ("circle", "square", "triangle")
MOTIONS = ("still", "left", "right", "up", "down", "bounces")


@dataclass(frozen=True)
class Thing:
    """One object; a field is None where it is unknown or does not apply (a single image has no motion).

    Attributes:
        place: where it starts, as (row, column) of three rows and three columns, or None.
    """

    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    size: str | None = None
    place: tuple[str, str] | None = None


@dataclass(frozen=True)
class Seen:
    """What is in a clip: its background and its objects, the largest first."""

    background: str | None = None
    objects: tuple[Thing, ...] = ()
