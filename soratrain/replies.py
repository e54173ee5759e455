"""What a language model replied, as far as captions and longer prompts are judged alike: what of it is text, and when
it is none that was asked for.
"""

from __future__ import annotations

import re

REASONS = ("empty", "repeated", "refused", "cut_off")
DECLINED = ("refusal", "content_filter")  # finish reasons of a server whose model did not want to, or was not let
MARKS = {'"': '"', "“": "”", "„": "“”", "«": "»", "»": "«", "「": "」", "『": "』", "‹": "›", "‘": "’", "'": "'"}
# Four or more characters said three times in a row, or one said eight times: a decoder that has lost its way.
REPEATED = re.compile(r"(.{4,400}?)\1\1|(\S)\2{7}", re.DOTALL)
# How models decline, at the beginning of what they say. The apostrophe is a plain one, letters are small.
CANNOT = r"(?:can ?not|can't|could(?:n't| not)|am (?:unable|not able) to|'m (?:unable|not able) to|won't|will not)"
REFUSED = re.compile(
    rf"""^\W*(?:
        (?:i\s?(?:'m|am)\s+)?(?:(?:very|so|really|truly)\s+)?sorry\b(?!-)
      | i\s?(?:'m|am)\s+afraid\b
      | (?:i\s+)?apologi[sz]e\b | (?:my\s+)?apologies\b
      | (?:unfortunately|regrettably)\b,?\s+(?:i\b|as\b|there\b|no\b|the\s+(?:image|picture|video|frame)s?\b|it\b)
      | (?:as|being)\s+an?\s+(?:ai\b|artificial\s+intelligence\b|(?:large\s+)?language\s+model|text-based)
      | i\s?(?:{CANNOT}|do(?:n't|\ not)\s+(?:have|see|feel))\b
      | (?:i'm|i\s+am|it's|we're)\s+(?:unable|not\s+able|not\s+allowed)\b
      | unable\s+to\s+(?:view|see|watch|process|describe|analy[sz]e|access|comply|assist|help|provide)\b
      | (?:there\s+(?:is|are|was|were)|it\s+(?:seems|appears|looks\s+like)[^.]{{0,40}})\s+no\s+
        (?:image|picture|video|frame|attachment)s?\b(?:\s+(?:was|were|is|are|has\s+been|have\s+been))?
        \s*(?:provided|attached|uploaded|included|visible|here|given|shown|to\s+(?:see|describe)|[.!]|$)
      | no\s+(?:image|picture|video|frame)s?\s+(?:(?:was|were|is|are|has\s+been)\s+)?(?:provided|attached|uploaded)\b
      | (?:please|could\s+you|can\s+you)\s+(?:please\s+)?(?:provide|upload|share|attach|send)\b
      | (?:很|非常)?(?:抱歉|对不起|不好意思) | 我(?:无法|不能)
      | (?:我)?(?:无法|不能|没办法)(?:描述|查看|看到|识别|提供|协助|帮助|处理)
    )""",
    re.VERBOSE,
)


def unquoted(text: str) -> str:
    """Return a text without quotation marks around the whole of it."""
    closing = MARKS.get(text[:1], "")
    if len(text) > 1 and closing and text[-1] in closing and not set(text[0] + closing) & set(text[1:-1]):
        return text[1:-1].strip()
    return text


def fault(text: str, *, declined: bool = False, cut: bool = False) -> str | None:
    """Return why a reply is not what was asked for, one of REASONS, or None.

    Args:
        text: one line, without what stands around it.
        declined: whether it is marked as a refusal.
        cut: whether it broke off before its end.
    """
    if declined:
        return "refused"
    if cut:
        return "cut_off"
    if not any(letter.isalnum() for letter in text):
        return "empty"
    if REFUSED.search(text.lower().replace("’", "'")):
        return "refused"
    return "repeated" if REPEATED.search(text + " ") else None  # the space that ends its last word, too
