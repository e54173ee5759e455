"""A sample's members: where they lie in its shard, and reading them in one piece."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from soratrain.data.ahead import FarReader, ReadAhead, Reader
from soratrain.data.manifest import Manifest, Row
from soratrain.data.remote import Range, Remote
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError


def range_of(row: Row) -> Range:
    """Return where a sample's members lie: shard, offset and length in bytes."""
    start = min(row.json_offset, row.media_offset)
    end = max(row.json_offset + row.json_length, row.media_offset + row.media_length)
    return row.shard, start, end - start


class MixedReader:
    """Reads the shards of several folders, each named by its whole path or URL.

    Args:
        readers: by folder.
    """

    def __init__(self, readers: Mapping[str, ShardReader]) -> None:
        self.readers = dict(readers)

    @property
    def remote(self) -> bool:
        """Whether any of the folders is in a store."""
        return any(reader.remote for reader in self.readers.values())

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`; errors are those of `ShardReader.read`."""
        folder, _, name = shard.rpartition("/")
        return self.readers[folder].read(name, offset, length)

    def fetch(self, ranges: Sequence[Range]) -> dict[Range, bytes | DataError]:
        """Return the bytes of ranges in stores, all fetched at once, or what is damaged about each; others are left."""
        found: dict[Range, bytes | DataError] = {}
        for folder, reader in self.readers.items():
            if reader.remote:
                own = [one for one in ranges if one[0].rpartition("/")[0] == folder]
                bare = [(shard.rpartition("/")[2], offset, length) for shard, offset, length in own]
                data = reader.fetch(bare)
                found |= {one: data[inside] for one, inside in zip(own, bare, strict=True)}
        return found

    def close(self) -> None:
        """Close what is open."""
        for reader in self.readers.values():
            reader.close()


def open_shards(manifest: Manifest, remote: Remote | None) -> Reader:
    """Return a reader of the shards of `manifest`, which reads ahead where they are in a store."""
    reader: FarReader
    if manifest.folders:
        sets = zip(manifest.folders, manifest.sets, strict=True)
        reader = MixedReader({folder.rstrip("/"): open_folder(part, folder, remote) for (folder, _), part in sets})
    else:
        reader = open_folder(manifest, manifest.folder, remote)
    return ReadAhead(reader, int((remote or Remote()).ahead_mb * 1e6)) if reader.remote else reader


def open_folder(manifest: Manifest, folder: str, remote: Remote | None) -> ShardReader:
    """Return a reader of one folder's shards."""
    ends = np.zeros(len(manifest.shards), dtype=np.int64)
    for offset, length in (("json_offset", "json_length"), ("media_offset", "media_length")):
        np.maximum.at(ends, manifest.shard, getattr(manifest, offset) + getattr(manifest, length))
    names = [name.rpartition("/")[2] for name in manifest.shards]
    last = {name: end for name, end in zip(names, ends.tolist(), strict=True) if end}
    return ShardReader(folder, remote, version=manifest.placed, ends=last)


def read_members(reader: Reader, row: Row) -> tuple[dict[str, Any], bytes]:
    """Return a sample's K.json and the bytes of its media member, in one read; checks the media's CRC-32.

    Raises:
        DataError: bytes are missing or changed.
    """
    shard, start, length = range_of(row)
    data = reader.read(shard, start, length)
    media = data[row.media_offset - start : row.media_offset - start + row.media_length]
    if zlib.crc32(media) != row.crc32:
        changed = "it is damaged, or its shard was written again after it was indexed"
        raise DataError(f"its bytes are not those that the manifest knows (CRC-32): {changed}")
    # a foreign sample may have no JSON: nothing is known of it but what the manifest says
    return json_object(data[row.json_offset - start : row.json_offset - start + row.json_length] or b"{}"), media


def json_object(text: bytes) -> dict[str, Any]:
    """Return a sample's K.json. Raises DataError where it is no JSON object: NaN and Infinity are not JSON either."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        value = json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise DataError(f"its K.json cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"its K.json holds a {type(value).__name__}, not an object")
    return value
