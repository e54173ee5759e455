"""Choosing one of a sample's captions, by weights and by its draw."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from soratrain.batch import draw_of
from soratrain.errors import ConfigError, DataError

SOURCES = ("synthetic", "original")
KEPT = "original"  # in the column `model` of captions made later: one that the clip came with, for want of a better one


def captions_of(header: dict[str, Any]) -> list[dict[str, str]]:
    """Return the captions in a K.json, as mappings with `type` and `text`.

    Another's may have them as strings, in `captions`, `caption` or `text`: these are of type `gt`.

    Raises:
        DataError: `captions` holds something else.
    """
    found = header.get("captions")
    if found is None:
        found = next((header[name] for name in ("caption", "text") if isinstance(header.get(name), str | list)), [])
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list):
        raise DataError(f"its K.json has captions that are a {type(found).__name__}, not a list")
    captions = [{"type": "gt", "text": " ".join(item.split())} if isinstance(item, str) else item for item in found]
    if not all(
        isinstance(item, dict) and isinstance(item.get("type"), str) and isinstance(item.get("text"), str)
        for item in captions
    ):
        raise DataError("its K.json has captions without type and text")
    return captions


def text_name(caption: str) -> str:
    """Return the name of the tensor that holds a caption's tokens or features in a latent's K.safetensors."""
    return f"text.{hashlib.blake2b(caption.encode('utf-8', 'replace'), digest_size=8).hexdigest()}"


class ByKey(Protocol):
    """Captions by key: a `CaptionTable`, or a dict."""

    def get(self, key: str, /) -> Sequence[Mapping[str, Any]] | None:
        """Return the captions of `key`, if any."""
        ...


class Choice(NamedTuple):
    """A caption that was chosen; its type and source are empty where a sample has none.

    Its source is where its words are from: `original` also where a table of captions made later has kept them.
    """

    text: str
    type: str
    source: str


class CaptionMix:
    """Chooses a caption from those in the shard (`original`) and those made later (`synthetic`).

    First the source is chosen, then the type, then one of the type's texts. Weights are relative among what a sample
    has: with no synthetic caption it shows an original one. A sample without any gives an empty text.

    Args:
        sources: weight of `synthetic` and `original`; 0.95 and 0.05 by default (Betker et al., 2023).
        types: weight by caption type; types that are not listed are never shown.
        made: tables of synthetic captions, each a mapping with `type` and `text`.
        beside: tables of original captions that lie beside the shards; they stand in for those in the shard.

    Raises:
        ConfigError: an unknown source, a negative weight, or none above 0.
    """

    def __init__(
        self,
        *,
        sources: Mapping[str, float] | None = None,
        types: Mapping[str, float] | None = None,
        made: Sequence[ByKey] = (),
        beside: Sequence[ByKey] = (),
    ) -> None:
        self.sources = dict(sources or {"synthetic": 0.95, "original": 0.05})
        self.types = dict(types or {"long": 1.0, "short": 1.0, "gt": 1.0})
        self.made, self.beside = made, beside
        if unknown := sorted(set(self.sources) - set(SOURCES)):
            raise ConfigError(f"data.caption_mix.{unknown[0]}: no such source of captions; use {' and '.join(SOURCES)}")
        for name, weights in (("caption_mix", self.sources), ("caption_types", self.types)):
            if wrong := sorted(key for key, weight in weights.items() if weight < 0):
                raise ConfigError(f"data.{name}.{wrong[0]}={weights[wrong[0]]}: must not be negative")
            if not any(weights.values()):
                raise ConfigError(f"data.{name}={weights}: shows no captions at all; give one of them a weight above 0")

    def choose(self, key: str, original: Sequence[Mapping[str, Any]], draw: int) -> Choice:
        """Return the caption of sample `key` at `draw`; `original` are the captions in its K.json."""
        original = first_of(self.beside, key) or original
        found: dict[str, dict[str, list[tuple[str, str]]]] = {}
        for source, captions in (("synthetic", first_of(self.made, key)), ("original", original)):
            for caption in captions:
                if self.sources.get(source, 0) > 0 and self.types.get(caption["type"], 0) > 0:
                    words = caption["text"], "original" if caption.get("model") == KEPT else source
                    found.setdefault(source, {}).setdefault(caption["type"], []).append(words)
        if not found:
            return Choice("", "", "")
        source = _weighted({name: self.sources[name] for name in found}, draw_of(draw, "caption source"))
        kind = _weighted({name: self.types[name] for name in found[source]}, draw_of(draw, "caption type"))
        texts = found[source][kind]
        text, source = texts[draw_of(draw, "caption text") % len(texts)]
        return Choice(text, kind, source)


def first_of(tables: Sequence[ByKey], key: str) -> Sequence[Mapping[str, Any]]:
    """Return what the first of the tables that knows `key` says of it."""
    return next((found for table in tables if (found := table.get(key))), ())


def _weighted(weights: Mapping[str, float], draw: int) -> str:
    """Return one of the names, as likely as its weight; `draw` is a 63-bit hash."""
    names = sorted(weights)
    place = draw / 2**63 * sum(weights.values())
    for name in names:
        place -= weights[name]
        if place < 0:
            return name
    return names[-1]
