"""What goes on with a run that has stopped: the same command, but without `fresh=true`, which would start it over."""

from __future__ import annotations

import re

SAME = re.compile(r"\b([Tt]he same command)\b(?! without)")
_fresh = False  # whether this process's command was told to start over, and has


def began(*, fresh: bool) -> None:
    """Note that a run has begun, and whether it emptied its folder first, as the same command would again."""
    global _fresh
    _fresh = fresh


def told(words: str) -> str:
    """Return what people are told about going on, true of the command that this process was started with."""
    return SAME.sub(r"\1 without fresh=true", words) if _fresh else words
