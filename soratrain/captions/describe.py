"""What becomes of a group of clips: each is asked about in every style, again where an answer is none, and then keeps
the caption that it came with.

Which clip an answer belongs to is decided where it is asked, by its place among the questions; nothing is looked up by
what is said or by when it comes.
"""

from __future__ import annotations

import logging
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from soratrain.batch import draw_of
from soratrain.captions.engine import Answer, Engine, Question, Seen
from soratrain.captions.faults import cleaned, fault, original, overlap
from soratrain.data.captions import KEPT

log = logging.getLogger(__name__)
UNKNOWN = "und"  # the language of a text of which nobody says it (ISO 639-3)


@dataclass
class Outcome:
    """What has become of some questions.

    Attributes:
        rows: of the table, without `rev`.
        counts: by `STYLE/WHAT`: captions, originals, missing, the reasons of rejection, compared and agreement.
        settled: key and style of what need not be asked again.
        failures: what went wrong, for people: key, style, reason, and whether it is final.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    settled: list[tuple[str, str]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, key: str, style: str, reason: str, *, final: bool) -> None:
        """Count and list what went wrong."""
        self.failures.append({"key": key, "style": style, "reason": reason, "final": final})

    def unreadable(self, key: str, styles: Sequence[str], reason: str) -> None:
        """Count and list a clip that cannot be decoded; it has no captions."""
        log.warning("clip %s is not described: %s", key, reason)
        self.settled += [(key, style) for style in styles]
        self.counts["/unreadable"] += 1
        self.fail(key, "", reason, final=True)


def describe(
    engine: Engine,
    clips: Sequence[tuple[Seen, Sequence[Mapping[str, Any]]]],
    wanted: Sequence[tuple[int, str]],
    *,
    attempts: int,
    seed: int,
    lang: str,
) -> Outcome:
    """Return the outcome of asking about `clips`.

    Args:
        clips: each with the captions that it came with.
        wanted: place of a clip and style, of each caption that is to be made.
        attempts: how often a rejected answer is asked for again, by chance that depends on seed, clip and style alone.
        seed: of that chance.
        lang: in which the engine answers.
    """
    outcome, found = Outcome(), dict[tuple[int, str], Answer]()
    looked = engine.look([seen for seen, _ in clips])
    questions = [Question(place, style, None) for place, style in wanted]
    for attempt in range(attempts + 1):
        again = []
        for question, answer in zip(questions, engine.ask(looked, questions), strict=True):
            place, style, _ = question
            found[place, style] = answer
            if (answer.final or not answer.failure) and (reason := fault(answer)):
                outcome.counts[f"{style}/{reason}"] += 1
                if not answer.final:
                    draw = draw_of(seed, clips[place][0].key, style, attempt)
                    again.append(Question(place, style, draw))
        questions = again
        if not questions:
            break
    for place, style in wanted:
        seen, given = clips[place]
        _settle(outcome, engine.model, seen.key, style, found[place, style], given, lang)
    return outcome


def _settle(
    outcome: Outcome,
    model: str,
    key: str,
    style: str,
    answer: Answer,
    given: Sequence[Mapping[str, Any]],
    lang: str,
) -> None:
    """Add to `outcome` the caption of one clip in one style, or why there is none."""
    if answer.failure:
        outcome.fail(key, style, answer.failure, final=answer.final)
        if not answer.final:
            return
    outcome.settled.append((key, style))
    own, text = original(given, style), cleaned(answer.text)
    if fault(answer):
        outcome.counts[f"{style}/{'originals' if own else 'missing'}"] += 1
        if own is None:
            return
        text, model, lang = cleaned(str(own["text"])), KEPT, str(own.get("lang") or UNKNOWN)
    else:
        lang = language(text, lang)
        if own is not None and own.get("type") == style:
            outcome.counts[f"{style}/compared"] += 1
            outcome.counts[f"{style}/agreement"] += overlap(text, str(own["text"]))  # type: ignore[assignment]
    outcome.counts[f"{style}/captions"] += 1
    outcome.rows.append({"key": key, "type": style, "text": text, "model": model, "lang": lang})


def language(text: str, lang: str) -> str:
    """Return the language that was asked for, unless English is not written in Latin letters: nobody knows it then."""
    letters = [letter for letter in text if letter.isalpha()]
    latin = sum(unicodedata.name(letter, "").startswith("LATIN") for letter in letters)
    return UNKNOWN if lang.startswith("en") and 2 * latin < len(letters) else lang
