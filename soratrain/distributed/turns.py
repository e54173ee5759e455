"""Sharing clips out among ranks that must all make equally many calls of a net."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Turn:
    """One clip that a rank takes.

    Attributes:
        clip: its number.
        parts: the calls over which its work is spread.
        calls: those to make, equally many on all ranks; what is beyond `parts` repeats the last.
        counts: whether its figures count, or another rank has them.
    """

    clip: int
    parts: int
    calls: int
    counts: bool


def deal(tokens: Mapping[int, int], ranks: int, pieces: int, room: int) -> list[list[Turn]]:
    """Return each rank's turns: every clip counts once, and in a turn all ranks have clips of like size.

    Args:
        tokens: of each clip, by number.
        pieces: the work of a clip: so many times its tokens.
        room: most tokens of a call, unless a single piece has more. How a clip is cut up follows from this and from its
            own tokens, so that its figures are the same for any number of ranks.
    """
    order = sorted(tokens, key=lambda number: (-tokens[number], number))
    parts = {number: -(-pieces // max(1, min(pieces, room // max(1, size)))) for number, size in tokens.items()}
    dealt: list[list[Turn]] = [[] for _ in range(ranks)]
    for start in range(0, len(order), ranks):
        row = order[start : start + ranks]
        calls = max(parts[number] for number in row)
        for rank, turns in enumerate(dealt):
            number = row[min(rank, len(row) - 1)]
            turns.append(Turn(number, parts[number], calls, rank < len(row)))
    return dealt
