"""Read captions back: what a text, ours or a captioner's attempt at one, says about a clip."""

from __future__ import annotations

import re
from collections.abc import Iterable

from data_prep.world.captions import VERBS
from data_prep.world.seen import BACKGROUNDS, COLORS, DIRECTIONS, PATTERNS, SHAPES, SIZES, TEXTURES, Seen, Thing


def one_of(words: Iterable[str]) -> str:
    """Return a regular expression for one of the words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


BACKGROUND = re.compile(rf"\b(?:({one_of(PATTERNS)})\s+)?({one_of(BACKGROUNDS)})\s+background\b")
COLOR = re.compile(rf"\b({one_of(COLORS)})\b")
SHAPE = re.compile(rf"\b({one_of(SHAPES)})s?\b")
THING = re.compile(rf"\b(?:({one_of(SIZES)})\s+)?(?:({one_of(TEXTURES)})\s+)?({one_of(COLORS)})\s+({one_of(SHAPES)})\b")
# Where an object starts is no motion: such a sentence is told by its verb.
PLACE = re.compile(r"\b(?:starts|is(?: first seen)?) (?:in|at|on) the (top|middle|bottom)?\s*(left|right)?(?=\W|$)")
CAMERA = re.compile(r"\bthe camera (pans|moves|zooms) (left|right|up|down|in|out)\b")
CAMERA_CLAUSE = re.compile(r"\bthe camera\b[^.;]*")
TO = rf"(?:to the )?({one_of(DIRECTIONS)})\b"
TWO_PART = re.compile(rf"\b(?:(waits)|moves {TO}),? then (?:(stops)|(bounces back|comes back)|(?:turns|moves) {TO})")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SIMPLE = {motion: re.compile(rf"\b(?:{one_of(verbs)})\b") for motion, verbs in VERBS.items()}


def read_caption(text: str) -> Seen:
    """Return what a caption says; what it does not say, or says in unknown words, is None. Never raises.

    A caption that names no object but, say, a colour gives one object with that colour.
    """
    text = " ".join(text.lower().split())
    camera = read_camera(text)
    text = CAMERA_CLAUSE.sub("", text)
    ground = BACKGROUND.search(text)
    text = BACKGROUND.sub("", text)
    matches = list(THING.finditer(text))
    things: list[Thing] = []
    for number, match in enumerate(matches):
        size, texture, color, shape = match.groups()
        end = matches[number + 1].start() if number + 1 < len(matches) else len(text)
        clause = text[match.end() : end]
        known = next((i for i, thing in enumerate(things) if (thing.color, thing.shape) == (color, shape)), None)
        if known is None:
            things.append(Thing(color, shape, read_motion(clause), size, texture, read_place(clause)))
        else:  # it is named again, in a sentence that says where it starts
            old = things[known]
            motion, place = old.motion or read_motion(clause), old.place or read_place(clause)
            things[known] = Thing(color, shape, motion, old.size, old.texture, place)
    if not things:
        loose_color, loose_shape = COLOR.search(text), SHAPE.search(text)
        if loose_color or loose_shape:
            things = [Thing(loose_color and loose_color[1], loose_shape and loose_shape[1], read_motion(text))]
    return Seen(ground and ground[2], tuple(things), camera, ground and ground[1])


def read_motion(clause: str) -> str | None:
    """Return the motion that a clause speaks of."""
    parts = TWO_PART.search(clause)
    if parts:
        waits, first, stops, returns, second = parts.groups()
        first = "still" if waits else first
        second = "still" if stops else OPPOSITE.get(first) if returns else second
        return f"{first}, {second}" if second else None
    return next((motion for motion in reversed(SIMPLE) if SIMPLE[motion].search(clause)), None)


def read_place(clause: str) -> tuple[str, str] | None:
    """Return the (row, column) at which a clause places an object."""
    found = PLACE.search(clause)
    return (found[1] or "middle", found[2] or "middle") if found and (found[1] or found[2]) else None


def read_camera(text: str) -> str | None:
    """Return what the camera does; None where the text does not speak of it."""
    found = CAMERA.search(text)
    if found:
        verb = "zooms" if found[1] == "zooms" else "pans"
        return f"{verb} {found[2]}"
    return "still" if "the camera" in text else None
