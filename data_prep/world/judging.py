"""Hold a caption against the truth about its clip: what it says rightly, what is wrong, and in which words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_prep.world.reading import Phrase, read_phrases, seen_in
from data_prep.world.seen import Seen, Thing

OF_THINGS = ("color", "shape", "size", "texture", "motion", "place")
OF_CLIPS = ("background", "pattern", "camera")
ATTRIBUTES = ("color", "shape", "number", "motion", "size", "camera", "texture", "place", "background", "pattern")
UNSAID = {"texture": "plain", "pattern": "plain"}  # what is meant where nothing is said


@dataclass(frozen=True)
class Judgement:
    """What is right and wrong in a caption.

    Attributes:
        scores: for each attribute that the truth has, the share that is named rightly, 0 to 1; of an object's, over the
            true objects. `number` is right where as many objects are named as there are, and no other count is claimed.
        named: objects that the caption names.
        invented: of these, such as are not there: no object of the clip has the colour and the shape that they are said
            to have.
        wrong: (start, end) of the words that contradict the truth, in `plain_text` of the caption, ascending.
    """

    scores: Mapping[str, float]
    named: int
    invented: int
    wrong: tuple[tuple[int, int], ...]


def judge(text: str, truth: Seen) -> Judgement:
    """Return what is right and wrong in a caption of a clip whose truth is known."""
    phrases = read_phrases(text)
    said = seen_in(phrases)
    meant = matched(said.objects, truth.objects)
    counts = [said.number, *(phrase.value for phrase in phrases if phrase.name == "number")]
    scores = {"number": float(all(count == truth.number for count in counts))}
    for name in OF_CLIPS:
        if (wanted := getattr(truth, name)) is not None:
            scores[name] = float(told(said, name) == wanted)
    named_for = {there: said.objects[place] for place, there in meant.items()}
    for name in OF_THINGS:
        right = [
            there in named_for and told(named_for[there], name) == getattr(thing, name)
            for there, thing in enumerate(truth.objects)
            if getattr(thing, name) is not None
        ]
        if right:
            scores[name] = sum(right) / len(right)
    real = sum(is_there(said.objects[place], truth.objects[there]) for place, there in meant.items())
    wrong = sorted((phrase.start, phrase.end) for phrase in phrases if contradicts(phrase, truth, meant))
    return Judgement(scores, named=said.number, invented=said.number - real, wrong=tuple(wrong))


def told(said: Seen | Thing, name: str) -> Any:
    """Return what is said, or what is meant where nothing is."""
    value = getattr(said, name)
    return UNSAID.get(name) if value is None else value


def is_there(said: Thing, thing: Thing) -> bool:
    """Return whether an object has the colour and shape that it is said to have; what is not said is not wrong."""
    return all(getattr(said, name) in (None, getattr(thing, name)) for name in ("color", "shape"))


def contradicts(phrase: Phrase, truth: Seen, meant: Mapping[int, int]) -> bool:
    """Return whether a phrase says what is not so; that nothing moves is so in an image, which has no motion."""
    if phrase.thing is None:
        wanted = truth.number if phrase.name == "number" else getattr(truth, phrase.name)
    elif phrase.thing in meant:
        wanted = getattr(truth.objects[meant[phrase.thing]], phrase.name)
    else:
        return True
    return phrase.value != wanted and (phrase.value, wanted) != ("still", None)


def matched(said: Sequence[Thing], things: Sequence[Thing]) -> dict[int, int]:
    """Return which true object each object that is said means: the nearest by colour and shape, then by their order."""
    found: dict[int, int] = {}
    for names in (("color", "shape"), ("color",), ("shape",), ()):
        for there, thing in enumerate(things):
            for place, other in enumerate(said):
                same = all(getattr(other, name) == getattr(thing, name) for name in names)
                if same and place not in found and there not in found.values():
                    found[place] = there
    return found
