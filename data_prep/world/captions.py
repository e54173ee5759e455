"""Captions of scenes, short and long, and their reading back."""

from __future__ import annotations

import re

from data_prep.world.scene import Scene
from data_prep.world.seen import BACKGROUNDS, COLORS, SHAPES, Seen, Thing
from soratrain.errors import ConfigError

# What an object does: the first way of saying it, and others that mean the same.
VERBS = {
    "still": ("stands still", "does not move"),
    "left": ("moves left", "moves to the left"),
    "right": ("moves right", "moves to the right"),
    "up": ("moves up", "rises"),
    "down": ("moves down", "sinks"),
    "bounces": ("bounces", "bounces up and down"),
}
SHORT = (
    "a {thing} {verb} on a {background} background",
    "on a {background} background, a {thing} {verb}",
    "a {thing} {verb} in front of a {background} background",
)
LONG = (
    "A {size} {thing} {verb} on a {background} background. It starts {place}, and the camera does not move.",
    "On a {background} background, a {size} {thing} {verb}. It is first seen {place}; the camera is fixed.",
)
SHORT_IMAGE = ("a {thing} on a {background} background", "a {thing} in front of a {background} background")
LONG_IMAGE = (
    "A {size} {thing} on a {background} background. It is {place}.",
    "On a {background} background, there is a {size} {thing}. It is {place}.",
)
STYLES = ("short", "long")


def describe(scene: Scene, style: str = "short") -> str:
    """Return a caption of the scene; the same scene always gets the same words.

    Raises:
        ConfigError: the style is neither "short" nor "long".
    """
    if style not in STYLES:
        raise ConfigError(f"a caption style {style!r} does not exist; use one of {', '.join(STYLES)}")
    truth = scene.truth
    thing = truth.objects[0]
    choice = scene.wording
    if thing.motion is None:
        templates, verb = (SHORT_IMAGE if style == "short" else LONG_IMAGE), ""
    else:
        templates = SHORT if style == "short" else LONG
        verbs = VERBS[thing.motion]
        verb = verbs[choice // 6 % len(verbs)]
    return templates[choice % len(templates)].format(
        thing=f"{thing.color} {thing.shape}",
        verb=verb,
        background=truth.background,
        size=thing.size,
        place=place_words(thing.place),
    )


def place_words(place: tuple[str, str] | None) -> str:
    """Return a place in words, as "at the top left" or "in the middle"."""
    if place is None or place == ("middle", "middle"):
        return "in the middle"
    row, column = place
    if column == "middle":
        return f"at the {row}"
    return f"on the {column}" if row == "middle" else f"at the {row} {column}"


def alternatives(words: tuple[str, ...] | dict[str, object]) -> str:
    """Return a regular expression for one of the words."""
    return "|".join(map(re.escape, words))


BACKGROUND = re.compile(rf"\b({alternatives(tuple(BACKGROUNDS))})\s+background\b")
THING = re.compile(rf"\b(?:(small|large)\s+)?({alternatives(tuple(COLORS))})\s+({alternatives(SHAPES)})\b")
MOTION = {
    motion: re.compile(r"\b(?:" + alternatives(tuple(sorted(verbs, key=len, reverse=True))) + r")\b")
    for motion, verbs in VERBS.items()
}


def read_caption(text: str) -> Seen:
    """Return what a caption says; what it does not say, or says in unknown words, is None. Never raises."""
    text = " ".join(text.lower().split())
    text = re.sub(r"\bthe camera\b[^.;]*", "", text)
    background = BACKGROUND.search(text)
    thing = THING.search(text)
    color = thing[2] if thing else first_word(COLORS, text)
    shape = thing[3] if thing else first_word(SHAPES, text)
    motion = next((name for name in reversed(MOTION) if MOTION[name].search(text)), None)
    objects = (Thing(color, shape, motion, size=thing[1] if thing else None),) if color or shape else ()
    return Seen(background[1] if background else None, objects)


def first_word(words: tuple[str, ...] | dict[str, tuple[int, int, int]], text: str) -> str | None:
    """Return whichever of the words stands first in the text."""
    found = re.search(rf"\b({alternatives(tuple(words))})\b", text)
    return found[1] if found else None
