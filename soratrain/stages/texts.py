"""What stage=encode stores of captions: tokens of an encoder that is trained along, features of one that is frozen."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from soratrain.data.caption_table import CaptionTable, open_captions
from soratrain.data.captions import text_name
from soratrain.models.hf_text import HFText
from soratrain.models.text import ByteTextEncoder, ByteTokens


class StoredText(Protocol):
    """Turns texts into one tensor each, without padding."""

    def identity(self) -> str:
        """Return what the tensors depend on."""
        ...

    def store(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the tensor of each text, on the CPU."""
        ...


def stored_text(factory: partial, device: torch.device) -> StoredText:
    """Return what stores texts for the encoder that `factory` builds."""
    if factory.func is ByteTextEncoder:
        return ByteTokens(**{key: factory.keywords[key] for key in ("table", "max_tokens") if key in factory.keywords})
    encoder = factory()
    assert isinstance(encoder, HFText)
    return encoder.to(device)


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

    def identity(self) -> str:
        """Return a hash of what the tensors depend on, beside the shards' own captions."""
        found = hashlib.sha256(self.encoder.identity().encode())
        for table in self.made.tables if self.made else ():
            for name in ("key", "text"):
                found.update("\n".join(table[name].to_pylist()).encode("utf-8", "replace"))
        return found.hexdigest()

    def __call__(self, keys: Sequence[str], captions: Sequence[Sequence[Mapping[str, Any]]]) -> list[dict[str, Tensor]]:
        """Return each clip's tensors by `text_name`; a text that several clips share is encoded once."""
        texts = [
            [str(caption["text"]) for caption in (*own, *((self.made.get(key) or ()) if self.made else ()))]
            for key, own in zip(keys, captions, strict=True)
        ]
        distinct = sorted({text for found in texts for text in found})
        tensors = dict(zip(distinct, self.encoder.store(distinct), strict=True)) if distinct else {}
        return [{text_name(text): tensors[text] for text in found} for found in texts]
