"""What can be said about a clip of the world: the vocabulary, and the record that truth, oracle and captions share."""

from __future__ import annotations

from dataclasses import dataclass

Color = tuple[int, int, int]

# Object colours differ in hue, backgrounds are muted, so that neither is ever taken for the other.
COLORS: dict[str, Color] = {
    "red": (226, 44, 44),
    "green": (44, 170, 62),
    "blue": (48, 92, 240),
    "yellow": (244, 206, 36),
    "purple": (182, 60, 220),
    "cyan": (40, 202, 222),
    "orange": (252, 134, 24),
    "pink": (250, 126, 190),
}
BACKGROUNDS: dict[str, Color] = {
    "black": (14, 14, 16),
    "white": (240, 240, 238),
    "grey": (126, 126, 128),
    "navy": (26, 32, 92),
}
SHAPES = ("circle", "square", "triangle", "star", "cross")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (1, -1), "down": (1, 1)}  # axis (0 is x) and sign; y points down
SIMPLE_MOTIONS = ("still", "left", "right", "up", "down", "bounces")
TEXTURES = ("plain", "striped", "spotted")
PATTERNS = ("plain", "checkered", "striped")  # of backgrounds
CAMERAS = ("still", "pans left", "pans right", "pans up", "pans down", "zooms in", "zooms out")
SIZES = ("small", "large")


def in_two_parts(first: str, second: str) -> str:
    """Return the name of a motion in two parts, as "right, up"."""
    return f"{first}, {second}"


# Vertical returns and stops are left to gravity: those motions are called "bounces" and "falls".
TWO_PARTS = tuple(
    in_two_parts(first, second)
    for first in ("still", *DIRECTIONS)
    for second in ("still", *DIRECTIONS)
    if first != second and {first, second} & {"left", "right"}
)


@dataclass(frozen=True)
class Vocabulary:
    """What may occur in a preset's clips."""

    colors: tuple[str, ...]
    shapes: tuple[str, ...]
    motions: tuple[str, ...]
    textures: tuple[str, ...] = ("plain",)
    cameras: tuple[str, ...] = ("still",)


VOCABULARIES = {
    "demo": Vocabulary(tuple(COLORS)[:6], SHAPES[:3], SIMPLE_MOTIONS),
    "full": Vocabulary(tuple(COLORS), SHAPES, (*SIMPLE_MOTIONS, "falls", "breaks", *TWO_PARTS), TEXTURES, CAMERAS),
}


@dataclass(frozen=True)
class Thing:
    """One object; a field is None where it is unknown or does not apply (a single image has no motion).

    Attributes:
        motion: relative to the ground, so that a moving camera does not move it. In two parts: "right, up".
        place: where it starts in the picture, as (row, column) of three rows and three columns.
        lasts: whether it is there all the time; being hidden behind another object is no absence.
    """

    color: str | None = None
    shape: str | None = None
    motion: str | None = None
    size: str | None = None
    texture: str | None = None
    place: tuple[str, str] | None = None
    lasts: bool | None = None


@dataclass(frozen=True)
class Seen:
    """What is in a clip: its background, its objects (the subject or the largest first) and what the camera does."""

    background: str | None = None
    objects: tuple[Thing, ...] = ()
    camera: str | None = None
    pattern: str | None = None

    @property
    def number(self) -> int:
        """How many objects there are."""
        return len(self.objects)


def agreement(seen: Seen, truth: Seen) -> dict[str, float]:
    """Return, for each attribute that the truth has, how far what is seen agrees with it, from 0 to 1.

    Of objects, the share that is right; objects are paired by colour and shape first, then by their order.
    """
    scores = {"background": float(seen.background == truth.background), "number": float(seen.number == truth.number)}
    if truth.camera is not None:
        scores["camera"] = float(seen.camera == truth.camera)
    pairs = pair(seen.objects, truth.objects)
    for name in ("color", "shape", "motion", "lasts"):
        judged = [getattr(a, name) == getattr(b, name) for a, b in pairs if getattr(b, name) is not None]
        if judged:
            scores[name] = sum(judged) / len(judged)
    return scores


def pair(found: tuple[Thing, ...], wanted: tuple[Thing, ...]) -> list[tuple[Thing, Thing]]:
    """Return every wanted object with the one that was found for it, an empty one where there is none."""
    left, right = list(found), list(wanted)
    pairs = []
    for same in (
        lambda a, b: (a.color, a.shape) == (b.color, b.shape),
        lambda a, b: a.color == b.color,
        lambda a, b: a.shape == b.shape,
        lambda a, b: True,
    ):
        for thing in list(right):
            match = next((other for other in left if same(other, thing)), None)
            if match is not None:
                left.remove(match)
                right.remove(thing)
                pairs.append((match, thing))
    return pairs + [(Thing(), thing) for thing in right]
