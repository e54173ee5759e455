"""Rounds in which the processes of a group encode a shard: parts of a clip too long for one, or a batch each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

from soratrain.data.assignment import Bucket
from soratrain.stages.encoding_parts import Part, joined

Batch = tuple[Bucket, np.ndarray]  # clips of one size, by their rows' numbers


@dataclass(frozen=True)
class Encoded:
    """A clip's latents, and its captions with what is stored of them; or why it cannot be decoded.

    Attributes:
        cut: captions that are longer than their encoder reads.
    """

    index: int
    captions: list[Any]
    latents: dict[str, Tensor] = field(default_factory=dict)
    texts: dict[str, Tensor] = field(default_factory=dict)
    failure: str = ""
    cut: int = 0


@dataclass(frozen=True)
class Round:
    """What is encoded at once.

    Attributes:
        batches: one for each process, or fewer; or one, of which each takes a part.
        parts: those.
    """

    batches: list[Batch]
    parts: list[Part]

    def of(self, place: int) -> tuple[Batch, Part | None] | None:
        """Return what the process at `place` in its group encodes, if anything."""
        if self.parts:
            return (self.batches[0], self.parts[place]) if place < len(self.parts) else None
        return (self.batches[place], None) if place < len(self.batches) else None

    def whole(self, found: Sequence[list[Encoded] | None]) -> Iterator[tuple[Bucket, list[Encoded]]]:
        """Yield each batch with its clips, from what every process has made."""
        made = [clips for clips in found if clips is not None]
        if self.parts:
            yield self.batches[0][0], [self._whole(pieces) for pieces in zip(*made, strict=True)]
            return
        for (bucket, _), clips in zip(self.batches, made, strict=True):
            yield bucket, clips

    def _whole(self, pieces: Sequence[Encoded]) -> Encoded:
        """Return a clip of its parts; one that cannot be decoded anywhere is left out."""
        lost = next((piece for piece in pieces if piece.failure), None)
        if lost is not None:
            return lost
        first = pieces[0]
        return Encoded(
            first.index, first.captions, joined(self.parts, [p.latents for p in pieces]), first.texts, cut=first.cut
        )


def rounds(batches: Iterable[tuple[Batch, list[Part]]], ranks: int) -> Iterator[Round]:
    """Yield the rounds of `ranks` processes, in which batches keep their order.

    Args:
        batches: each with the parts into which it is cut; none where one process encodes it.
    """
    waiting: list[Batch] = []
    for batch, parts in batches:
        if waiting and (parts or len(waiting) == ranks):
            yield Round(waiting, [])
            waiting = []
        if parts:
            yield Round([batch], parts)
        else:
            waiting.append(batch)
    if waiting:
        yield Round(waiting, [])
