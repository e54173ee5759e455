"""What is no caption, and what is left of an answer when all that is not text is taken off it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from soratrain import replies
from soratrain.captions.engine import Answer
from soratrain.chat_messages import spoken
from soratrain.models.writing import clean
from soratrain.replies import unquoted


def cleaned(text: str) -> str:
    """Return an answer as one line: no thoughts before it, no control characters, no quotes around it."""
    return unquoted(clean(spoken(text).encode("utf-8", "ignore").decode()))


def fault(answer: Answer) -> str | None:
    """Return why an answer is no description, one of `replies.REASONS`, or None."""
    declined = bool(answer.failure) or answer.declined
    return replies.fault(cleaned(answer.text), declined=declined, cut=answer.cut)


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
