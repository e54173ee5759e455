"""A sample's members: where they lie in its shard, and reading them in one piece."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from soratrain.data.manifest import Manifest, Row
from soratrain.data.remote import Range, Remote
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError


def _refuse(constant: str) -> None:
    """Take NaN and Infinity for what they are in JSON: an error."""
    raise ValueError(f"{constant} is not JSON")


def range_of(row: Row) -> Range:
    """Return where a sample's members lie: shard, offset and length in bytes."""
    start = min(row.json_offset, row.media_offset)
    end = max(row.json_offset + row.json_length, row.media_offset + row.media_length)
    return row.shard, start, end - start


def open_shards(manifest: Manifest, remote: Remote | None) -> ShardReader:
    """Return a reader of the shards of `manifest`."""
    ends = np.zeros(len(manifest.shards), dtype=np.int64)
    for offset, length in (("json_offset", "json_length"), ("media_offset", "media_length")):
        np.maximum.at(ends, manifest.shard, getattr(manifest, offset) + getattr(manifest, length))
    last = dict(zip(manifest.shards, ends.tolist(), strict=True))
    return ShardReader(manifest.folder, remote, version=manifest.hash, ends=last)


def read_members(reader: ShardReader, row: Row) -> tuple[dict[str, Any], bytes]:
    """Return a sample's K.json and the bytes of its media member, in one read; checks the media's CRC-32.

    Raises:
        DataError: bytes are missing or changed.
    """
    shard, start, length = range_of(row)
    data = reader.read(shard, start, length)
    media = data[row.media_offset - start : row.media_offset - start + row.media_length]
    if zlib.crc32(media) != row.crc32:
        raise DataError("its bytes are not those that the manifest knows (CRC-32)")
    try:
        # a foreign sample may have no JSON: nothing is known of it but what the manifest says
        text = data[row.json_offset - start : row.json_offset - start + row.json_length] or b"{}"
        header = json.loads(text, parse_constant=_refuse)
    except ValueError as error:
        raise DataError(f"its K.json cannot be read: {error}") from error
    if not isinstance(header, dict):
        raise DataError(f"its K.json holds a {type(header).__name__}, not an object")
    return header, media


def fetch_ahead(reader: ShardReader, manifest: Manifest, samples: Sequence[int], kept: Sequence[bool]) -> None:
    """Fetch at once, where shards are in a store, the samples that are not `kept` in memory."""
    if reader.remote:
        wanted = [index for index, have in zip(samples, kept, strict=True) if not have]
        reader.ahead([range_of(manifest.row(index)) for index in wanted])
