"""What stage=encode stores of captions: tokens of an encoder that is trained along, features of one that is frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from soratrain.data.caption_table import CaptionTable, open_captions
from soratrain.data.captions import text_name
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_text import HFText
from soratrain.models.text import ByteTextEncoder, ByteTokens


class StoredText(Protocol):
    """Turns texts into one tensor each, without padding."""

    def identity(self) -> str:
        """Return what the tensors depend on."""
        ...

    def record(self) -> dict[str, Any]:
        """Return what is kept beside the tensors: whose they are."""
        ...

    def store(self, texts: Sequence[str]) -> tuple[list[Tensor], set[int]]:
        """Return the tensor of each text, on the CPU, and the places of the texts that were cut."""
        ...


@dataclass(frozen=True)
class OnDevice:
    """A frozen encoder that computes on a device."""

    encoder: HFText
    device: torch.device

    def identity(self) -> str:
        """Return what the features depend on."""
        return self.encoder.identity()

    def record(self) -> dict[str, Any]:
        """Return whose features they are."""
        return self.encoder.record()

    def store(self, texts: Sequence[str]) -> tuple[list[Tensor], set[int]]:
        """Return the features of each text, and the places of the texts that were cut."""
        return self.encoder.store(texts, self.device)


def stored_text(factory: partial, device: torch.device) -> StoredText:
    """Return what stores texts for the encoder that `factory` builds.

    Raises:
        ConfigError, DataError: a frozen encoder cannot be read.
    """
    given = {key: value for key, value in factory.keywords.items() if key != "features"}
    if factory.func is ByteTextEncoder:
        return ByteTokens(**{key: given[key] for key in ("table", "max_tokens") if key in given})
    assert factory.func is FrozenText
    encoder = HFText(**given)
    encoder.load(device)
    return OnDevice(encoder, device)


class Texts:
    """The captions of clips as tensors.

    Args:
        encoder: what makes them.
        captions: folder of captions made later, stored beside those in the shards; or None.

    Raises:
        DataError: that folder holds none.
    """

    def __init__(self, encoder: StoredText, captions: str | None = None) -> None:
        self.encoder = encoder
        self.made: CaptionTable | None = None if captions is None else open_captions(captions)

    @classmethod
    def of(cls, factory: partial | None, captions: str | None, device: torch.device) -> Texts | None:
        """Return what stores captions for the encoder that `factory` builds; None where none shall be stored."""
        if factory is None or factory.keywords.get("features") == "live":
            return None
        return cls(stored_text(factory, device), captions)

    def identity(self) -> str:
        """Return a hash of what the tensors depend on, beside the shards' own captions."""
        found = hashlib.sha256(self.encoder.identity().encode())
        for table in self.made.tables if self.made else ():
            for name in ("key", "text"):
                found.update("\n".join(table[name].to_pylist()).encode("utf-8", "replace"))
        return found.hexdigest()

    def __call__(
        self, keys: Sequence[str], captions: Sequence[Sequence[Mapping[str, Any]]]
    ) -> list[tuple[dict[str, Tensor], int]]:
        """Return each clip's tensors by `text_name`, and how many of its captions are longer than the encoder reads.

        A text that several clips share is encoded once.
        """
        texts = [
            [str(caption["text"]) for caption in (*own, *((self.made.get(key) or ()) if self.made else ()))]
            for key, own in zip(keys, captions, strict=True)
        ]
        distinct = sorted({text for found in texts for text in found})
        stored, cut = self.encoder.store(distinct) if distinct else ([], set())
        tensors, longer = dict(zip(distinct, stored, strict=True)), {distinct[place] for place in cut}
        return [
            ({text_name(text): tensors[text] for text in found}, sum(text in longer for text in found))
            for found in texts
        ]
