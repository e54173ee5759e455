"""How our captions are written: pairs of a short and a long text of one clip, drawn from what the DiT was trained on.

They come from captions that stage=recaption has made, else from those beside the shards, else from those in them. A
draw opens few files, however many clips there are: parts of the tables come in an order of the seed, until one has
enough.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from soratrain.batch import draw_of
from soratrain.data.captions import KEPT, captions_of
from soratrain.data.manifest import CAPTION_SCHEMA, MANIFEST_SCHEMA
from soratrain.data.shards import ShardReader
from soratrain.data.tables import Part, batches, parts
from soratrain.errors import DataError, UserError
from soratrain.replies import REPEATED

log = logging.getLogger(__name__)

UNREADABLE = (UserError, OSError, pa.ArrowException)
SHORT = ("short", "gt")  # what people's prompts are most like
LONGEST = 1500  # characters of an example
CANDIDATES = 64  # pairs among which the seed chooses
PARTS = 8  # of each folder's tables that are opened, at most
READ = 256  # clips of shards that are looked at for pairs
SCANNED = 1 << 21  # rows of manifests that are looked through for the kinds of clips
MADE = ["*.parquet", "*/*.parquet", "captions/*/*.parquet"]  # tables in a folder of captions


class Example(NamedTuple):
    """What someone might ask for, and how a caption of that clip reads."""

    short: str
    long: str


class Found(NamedTuple):
    """A clip's pair, and whether the clip is of another kind than was wanted."""

    key: str
    pair: Example
    other: bool


Places = Sequence[str]


def draw_examples(
    captions: Places, shards: Places, *, count: int, style: str, still: bool, seed: int
) -> tuple[list[Example], str]:
    """Return examples and the folder that they are from; none, and "", where no folder has any.

    Args:
        captions, shards: folders or URLs; those that are missing or unreadable are passed over.
        count: how many, at most.
        style: type of the long ones.
        still: of pictures rather than of videos, where the manifest tells and there are some.
        seed: chooses.
    """
    if not count:
        return [], ""
    tables = [(place, MADE) for place in captions] + [(place, MADE[2:]) for place in shards]
    for place, found in [
        *((place, _of_tables(place, patterns, shards, style, still, seed)) for place, patterns in tables),
        *((place, _of_shards(place, style, still, seed)) for place in shards),
    ]:
        try:
            pairs = list(islice(found, CANDIDATES))
        except UNREADABLE as error:
            log.warning("%s: no examples of captions from there: %s", place, error)
            continue
        if pairs:
            pairs.sort(key=lambda found: (found.other, draw_of(seed, "example", found.key)))
            return [found.pair for found in pairs[:count]], place
    return [], ""


def pair_of(captions: Sequence[Mapping[str, Any]], style: str) -> Example | None:
    """Return the short and the long text among a clip's captions, if both can be shown."""
    texts: dict[str, list[str]] = {kind: [] for kind in (*SHORT, style)}
    for caption in captions:
        text = " ".join(str(caption.get("text", "")).split())
        shown = text.isprintable() and 0 < len(text) <= LONGEST and not REPEATED.search(text)
        if shown and caption.get("model") != KEPT and caption.get("type") in texts:
            texts[str(caption["type"])].append(text)
    short, long = min(texts["short"] or texts["gt"] or [""]), min(texts[style] or [""])
    return Example(short, long) if short and len(long) > len(short) else None


def _ordered(found: Sequence[Part], seed: int) -> list[Part]:
    return sorted(found, key=lambda part: draw_of(seed, part.path.rpartition("/")[2], part.path))


def _of_tables(
    place: str, patterns: Sequence[str], shards: Places, style: str, still: bool, seed: int
) -> Iterator[Found]:
    """Yield clips and their pairs from tables of captions, those of the wanted kind first."""
    others: list[Found] = []
    for part in _ordered(parts(place, list(patterns)), seed)[:PARTS]:
        clips: dict[str, list[dict[str, str]]] = {}
        for batch in batches(part, CAPTION_SCHEMA, ["key", "type", "text", "model"]):
            for row in batch.to_pylist():
                clips.setdefault(row["key"], []).append(row)
        order = sorted(clips, key=lambda key: draw_of(seed, key))
        pairs = ((key, pair) for key in order if (pair := pair_of(clips[key], style)))
        chosen = dict(islice(pairs, 16 * CANDIDATES))
        kinds = _kinds(shards, list(chosen))
        for key, pair in chosen.items():
            if kinds.get(key, still) == still:
                yield Found(key, pair, False)
            else:
                others.append(Found(key, pair, True))
    yield from others


def _kinds(shards: Places, keys: Sequence[str]) -> dict[str, bool]:
    """Return which of some clips are still, as far as manifests tell without being read for long."""
    found: dict[str, bool] = {}
    wanted, scanned = pa.array(keys, pa.string()), 0
    for place in shards:
        try:
            for part in parts(place, ["manifest/part-*.parquet"]):
                for batch in batches(part, MANIFEST_SCHEMA, ["key", "kind"]):
                    scanned += len(batch)
                    rows = batch.filter(pc.is_in(batch["key"], value_set=wanted)).to_pylist()
                    found |= {row["key"]: row["kind"] == "image" for row in rows}
                    if len(found) == len(keys) or scanned > SCANNED:
                        return found
        except UNREADABLE as error:
            log.warning("%s: which clips are pictures is not known: %s", place, error)
    return found


def _of_shards(place: str, style: str, still: bool, seed: int) -> Iterator[Found]:
    """Yield clips and their pairs from the K.json in shards, those of the wanted kind first."""
    columns = ["key", "kind", "shard", "json_offset", "json_length"]
    reader, looked = ShardReader(place), 0
    for part in _ordered(parts(place, ["manifest/part-*.parquet"]), seed)[:PARTS]:
        rows = [row for batch in batches(part, MANIFEST_SCHEMA, columns) for row in batch.to_pylist()]
        rows.sort(key=lambda row: ((row["kind"] == "image") != still, draw_of(seed, row["key"])))
        for row in rows[: READ - looked]:
            looked += 1
            try:
                header = json.loads(reader.read(row["shard"], row["json_offset"], row["json_length"]))
                pair = pair_of(captions_of(header), style) if isinstance(header, dict) else None
            except (ValueError, DataError):
                continue  # a damaged clip has nothing to show
            if pair:
                yield Found(row["key"], pair, (row["kind"] == "image") != still)
