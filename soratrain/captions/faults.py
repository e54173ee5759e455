"""What is no caption, and what is left of an answer when all that is not text is taken off it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from soratrain.captions.engine import Answer
from soratrain.chat_messages import spoken
from soratrain.models.writing import clean

REASONS = ("empty", "repeated", "refused", "cut_off")
# Four or more characters said three times in a row, or one said eight times: a decoder that has lost its way.
REPEATED = re.compile(r"(.{4,400}?)\1\1|(\S)\2{7}", re.DOTALL)
QUOTES = {'"': '"', "“": "”", "«": "»", "「": "」", "'": "'"}
# How models decline, at the beginning of what they say. The apostrophe is a plain one, letters are small.
CANNOT = r"(?:can ?not|can't|could(?:n't| not)|am (?:unable|not able) to|'m (?:unable|not able) to|won't|will not)"
REFUSED = re.compile(
    rf"""^\W*(?:
        (?:i\s?(?:'m|am)\s+)?(?:(?:very|so|really|truly)\s+)?sorry\b(?!-)
      | i\s?(?:'m|am)\s+afraid\b
      | (?:i\s+)?apologi[sz]e\b | (?:my\s+)?apologies\b
      | (?:unfortunately|regrettably)\b,?\s+(?:i\b|as\b|there\b|no\b|the\s+(?:image|picture|video|frame)s?\b|it\b)
      | (?:as|being)\s+an?\s+(?:ai\b|artificial\b|(?:large\s+)?language\s+model|text-based)
      | i\s?(?:{CANNOT}|do(?:n't|\ not)\s+(?:have|see|feel))\b
      | (?:i'm|i\s+am|it's|we're)\s+(?:unable|not\s+able|not\s+allowed)\b
      | unable\s+to\s+(?:view|see|watch|process|describe|analy[sz]e|access|comply|assist|help|provide)\b
      | (?:there\s+(?:is|are|was|were)|it\s+(?:seems|appears|looks\s+like)[^.]{{0,40}})\s+no\s+
        (?:image|picture|video|frame|attachment)s?\b(?:\s+(?:was|were|is|are|has\s+been|have\s+been))?
        \s*(?:provided|attached|uploaded|included|visible|here|given|shown|to\s+(?:see|describe)|[.!]|$)
      | no\s+(?:image|picture|video|frame)s?\s+(?:(?:was|were|is|are|has\s+been)\s+)?(?:provided|attached|uploaded)\b
      | (?:please|could\s+you|can\s+you)\s+(?:please\s+)?(?:provide|upload|share|attach|send)\b
      | (?:很|非常)?(?:抱歉|对不起|不好意思) | (?:我)?(?:无法|不能|没办法)(?:描述|查看|看到|识别|提供|协助|帮助|处理)
    )""",
    re.VERBOSE,
)


def cleaned(text: str) -> str:
    """Return an answer as one line: no thoughts before it, no control characters, no quotes around it."""
    text = clean(spoken(text).encode("utf-8", "ignore").decode())
    if len(text) > 1 and QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def fault(answer: Answer) -> str | None:
    """Return why an answer is no description, one of REASONS, or None."""
    if answer.failure or answer.declined:
        return "refused"
    if answer.cut:
        return "cut_off"
    text = cleaned(answer.text)
    if not any(letter.isalnum() for letter in text):
        return "empty"
    if REFUSED.search(text.lower().replace("’", "'")):
        return "refused"
    return "repeated" if REPEATED.search(text + " ") else None  # the space that ends its last word, too


def overlap(one: str, other: str) -> float:
    """Return the F1 score of the words that two captions share, 0 to 1."""
    first, second = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    return 2 * (first & second).total() / max(first.total() + second.total(), 1)


def original(captions: Sequence[Mapping[str, Any]], style: str) -> Mapping[str, Any] | None:
    """Return the caption that a clip came with: of this style, else of its own words (`gt`), else any; or None."""
    for kinds in ({style}, {"gt"}, {caption.get("type") for caption in captions}):
        for caption in captions:
            if caption.get("type") in kinds and cleaned(str(caption.get("text", ""))):
                return caption
    return None
