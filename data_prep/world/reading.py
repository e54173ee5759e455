"""Read captions back: what a text, ours or a captioner's attempt at one, says about a clip, and in which words."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.world.captions import VERBS
from data_prep.world.seen import BACKGROUNDS, COLORS, DIRECTIONS, PATTERNS, SHAPES, SIZES, TEXTURES, Seen, Thing


def one_of(words: Iterable[str]) -> str:
    """Return a regular expression for one of the words, the longest first."""
    return "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))


COUNTS = ("one", "two", "three", "four", "five")
BACKGROUND = re.compile(rf"\b(?:({one_of(PATTERNS)})\s+)?({one_of(BACKGROUNDS)})\s+background\b")
COLOR = re.compile(rf"\b({one_of(COLORS)})\b")
SHAPE = re.compile(rf"\b({one_of(SHAPES)})s?\b")
THING = re.compile(rf"\b(?:({one_of(SIZES)})\s+)?(?:({one_of(TEXTURES)})\s+)?({one_of(COLORS)})\s+({one_of(SHAPES)})\b")
ARTICLE = re.compile(r"\ban? $")  # before a name it brings in an object, even one of the same name as another
PARTS = ("size", "texture", "color", "shape")  # what THING's groups are
NUMBER = re.compile(rf"\bthere (?:is|are) ({one_of(COUNTS)}) objects?\b")
# Where an object starts is no motion: such a sentence is told by its verb.
PLACE = re.compile(r"\b(?:starts|is(?: first seen)?) (?:in|at|on) the (top|middle|bottom)?\s*(left|right)?(?=\W|$)")
CAMERA = re.compile(r"\bthe camera (pans|moves|zooms) (left|right|up|down|in|out)\b")
CAMERA_CLAUSE = re.compile(r"\bthe camera\b[^.;]*")
TO = rf"(?:to the )?({one_of(DIRECTIONS)})\b"
TWO_PART = re.compile(rf"\b(?:(waits)|moves {TO}),? then (?:(stops)|(bounces back|comes back)|(?:turns|moves) {TO})")
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}
SIMPLE = {motion: re.compile(rf"\b(?:{one_of(verbs)})\b") for motion, verbs in VERBS.items()}


@dataclass(frozen=True)
class Phrase:
    """Words of a caption that say one thing.

    Attributes:
        name: of what, as `Seen` and `Thing` call it; `number` is one that is said in words.
        value: what is said of it.
        start, end: where the words stand in the caption.
        thing: of which object, by the order in which they are first named; None is of the clip.
    """

    name: str
    value: Any
    start: int
    end: int
    thing: int | None = None


def plain_text(text: str) -> str:
    """Return a caption as it is read: single spaces."""
    return " ".join(text.split())


def read_caption(text: str) -> Seen:
    """Return what a caption says; what it does not say, or says in unknown words, is None. Never raises.

    A caption that names no object but, say, a colour gives one object with that colour.
    """
    return seen_in(read_phrases(text))


def seen_in(phrases: Sequence[Phrase]) -> Seen:
    """Return what phrases say together; of a thing that is said twice, the first counts."""
    clip: dict[str, Any] = {}
    things: dict[int, dict[str, Any]] = {}
    for phrase in phrases:
        (clip if phrase.thing is None else things.setdefault(phrase.thing, {})).setdefault(phrase.name, phrase.value)
    clip.pop("number", None)
    return Seen(objects=tuple(Thing(**things[number]) for number in sorted(things)), **clip)


def read_phrases(text: str) -> list[Phrase]:
    """Return what a caption says, phrase by phrase; places are those in `plain_text(text)`. Never raises."""
    text = "".join(letter.lower() if len(letter.lower()) == 1 else letter for letter in plain_text(text))
    phrases = list(read_camera(text))
    text = CAMERA_CLAUSE.sub(blank, text)
    if ground := BACKGROUND.search(text):
        named = ((1, "pattern"), (2, "background"))
        phrases += [Phrase(name, ground[i], *ground.span(i)) for i, name in named if ground[i]]
    text = BACKGROUND.sub(blank, text)
    if count := NUMBER.search(text):
        phrases.append(Phrase("number", 1 + COUNTS.index(count[1]), *count.span(1)))
    matches = list(THING.finditer(text))
    known: list[tuple[Any, ...]] = []
    introduced: set[tuple[Any, ...]] = set()
    for number, match in enumerate(matches):
        named_so = (match[3], match[4])
        anew = ARTICLE.search(text[max(0, match.start() - 4) : match.start()]) is not None
        if named_so not in known or (anew and named_so in introduced):
            known.append(named_so)
        introduced |= {named_so} if anew else set()
        thing = len(known) - 1 - known[::-1].index(named_so) if anew else known.index(named_so)
        phrases += [Phrase(name, match[i], *match.span(i), thing) for i, name in enumerate(PARTS, 1) if match[i]]
        end = matches[number + 1].start() if number + 1 < len(matches) else len(text)
        phrases += read_motion(text, match.end(), end, thing)
        phrases += read_place(text, match.end(), end, thing)
    if not matches:
        searched = (("color", COLOR.search(text)), ("shape", SHAPE.search(text)))
        loose = [Phrase(name, found[1], *found.span(1), 0) for name, found in searched if found]
        phrases += [*loose, *read_motion(text, 0, len(text), 0)] if loose else []
    return phrases


def blank(match: re.Match[str]) -> str:
    """Return as many spaces, so that what follows stays where it is."""
    return " " * len(match[0])


def read_motion(text: str, start: int, end: int, thing: int) -> Iterator[Phrase]:
    """Yield the motion that a clause speaks of."""
    if parts := TWO_PART.search(text, start, end):
        waits, first, stops, returns, second = parts.groups()
        first = "still" if waits else first
        second = "still" if stops else OPPOSITE.get(first) if returns else second
        if second:
            yield Phrase("motion", f"{first}, {second}", *parts.span(), thing)
        return
    found = ((motion, SIMPLE[motion].search(text, start, end)) for motion in reversed(SIMPLE))
    yield from [Phrase("motion", motion, *match.span(), thing) for motion, match in found if match][:1]


def read_place(text: str, start: int, end: int, thing: int) -> Iterator[Phrase]:
    """Yield the (row, column) at which a clause places an object."""
    found = PLACE.search(text, start, end)
    if found and (found[1] or found[2]):
        words = [found.span(group) for group in (1, 2) if found[group]]
        yield Phrase("place", (found[1] or "middle", found[2] or "middle"), words[0][0], words[-1][1], thing)


def read_camera(text: str) -> Iterator[Phrase]:
    """Yield what the camera does; nothing where the text does not speak of it."""
    if found := CAMERA.search(text):
        verb = "zooms" if found[1] == "zooms" else "pans"
        yield Phrase("camera", f"{verb} {found[2]}", found.start(1), found.end())
    elif clause := CAMERA_CLAUSE.search(text):
        yield Phrase("camera", "still", *clause.span())
