"""What is left of a language model's reply when all that is no caption is taken off, and what is wrong with it."""

from __future__ import annotations

import re

from soratrain.chat import Reply
from soratrain.diffusion.sizes import PROMPT_BYTES
from soratrain.models.writing import one_line
from soratrain.replies import DECLINED, fault, unquoted

# What stands in quotation marks. Those that are apostrophes too stand at the ends of words, and no " that opens stands
# after a digit, whose inches it would be.
QUOTED = re.compile(
    r"""(?<!\d)"[^"]*" | “[^”]*” | „[^“”]*[“”] | «[^»]*» | »[^«]*« | 「[^」]*」 | 『[^』]*』 | ‹[^›]*›
      | ‘[^‘]*?’(?!\w) | (?<!\w)'[^']*'(?!\w)""",
    re.X,
)
LABEL = re.compile(  # before a caption: "Sure! Here is the expanded prompt:"
    r"^\W*(?:(?:sure|certainly|of course)\W+)?(?:here(?:'s|’s| is)\s+)?"
    r"(?:(?:the|a|an|your|expanded|detailed|rewritten|longer|long|video|image)\s+)*(?:caption|prompt|description)\W*:\s*",
    re.I,
)
BOLD = re.compile(r"\*\*(?=\S)(.+?)(?<=\S)\*\*")
SAID = {"repeated": "repeated itself", "cut_off": "cut off"}  # of the reasons that are not words of a sentence


def cleaned(text: str, *, bold: bool = False) -> str:
    """Return a reply as one line: without control characters, a label before it, or marks around the whole of it.

    Args:
        bold: `**` stays, since the prompt has it too.
    """
    text = one_line(text)
    text = unquoted(text if bold else BOLD.sub(r"\1", text))
    return unquoted(LABEL.sub("", text).strip())


def quotes(text: str) -> list[tuple[str, str, str]]:
    """Return what stands in quotation marks in a text, each with its two marks, outermost ones alone."""
    found = [match.group() for match in QUOTED.finditer(text)]
    return [(said[0], said[1:-1], said[-1]) for said in found if said[1:-1].strip()]


def kept(prompt: str, text: str) -> tuple[str, list[str]]:
    """Return a text in which the prompt's quotations have the prompt's own marks, and those that it has lost.

    A quotation is kept where it stands as it is, or the same letters in marks of any kind.
    """
    lost = []
    for opening, inner, closing in quotes(one_line(prompt)):
        if f"{opening}{inner}{closing}" in text:
            continue
        said = next((quote for quote in quotes(text) if quote[1] == inner), None)
        if said is None:
            lost.append(f"{opening}{inner}{closing}")
        else:
            text = text.replace("".join(said), f"{opening}{inner}{closing}")
    return text, lost


def caption_of(prompt: str, reply: Reply) -> tuple[str, str]:
    """Return the longer prompt that a reply is, or "" and why it is none, in a word or two."""
    if len(reply.text.encode()) > 2 * PROMPT_BYTES:  # before anything looks through all of it
        return "", "too long"
    text = cleaned(reply.text, bold="**" in prompt)
    if reason := fault(text, declined=reply.finish_reason in DECLINED, cut=reply.finish_reason == "length"):
        return "", SAID.get(reason, reason)
    if len(text.encode()) > PROMPT_BYTES:
        return "", "too long"
    text, lost = kept(prompt, text)
    if lost:
        return "", f"lost {', '.join(lost)[:80]}"
    return (text, "") if 2 * len(text) >= len(prompt.strip()) else ("", "too short")
