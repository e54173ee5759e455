"""Reading parquet tables beside shards, wherever these are: part by part, so that no whole table is ever in memory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from soratrain.data.remote import patient
from soratrain.errors import DataError

ROWS = 1 << 17  # read at a time


@dataclass(frozen=True)
class Part:
    """One parquet file: where it is, and what changes whenever it does."""

    folder: str
    path: str
    stamp: str


@patient
def parts(folder: str, patterns: Sequence[str]) -> list[Part]:
    """Return the files under `folder` (a path or a URL) that match, in order of their names."""
    filesystem, root = fsspec.core.url_to_fs(folder.rstrip("/"))
    paths = sorted({path for pattern in patterns for path in filesystem.glob(f"{root}/{pattern}")})
    return [Part(folder, path, _stamp(filesystem, path)) for path in paths]


def identity(found: Sequence[Part], *more: object) -> str:
    """Return a name for what is made of these files."""
    return hashlib.blake2b(repr((list(found), *more)).encode(), digest_size=12).hexdigest()


def batches(part: Part, schema: pa.Schema, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Yield some columns of a file, cast to `schema`. Raises DataError where it is no such table."""
    file = pq.ParquetFile(_content(part.folder, part.path))
    if missing := sorted(set(schema.names) - set(file.schema_arrow.names)):
        raise DataError(f"{part.path} has no columns {missing}; it was written by something else")
    wanted = pa.schema([schema.field(name) for name in columns])
    for batch in file.iter_batches(ROWS, columns=list(columns)):
        yield from pa.Table.from_batches([batch]).select(columns).cast(wanted).to_batches()


def rows_in(part: Part) -> int:
    """Return how many rows a file has."""
    return pq.ParquetFile(_content(part.folder, part.path)).metadata.num_rows


@patient
def content(part: Part) -> bytes:
    """Return the bytes of a file."""
    filesystem, _ = fsspec.core.url_to_fs(part.folder)
    return filesystem.cat_file(part.path)


@patient
def _content(folder: str, path: str) -> str | pa.BufferReader:
    filesystem, _ = fsspec.core.url_to_fs(folder)
    return path if _is_local(filesystem) else pa.BufferReader(filesystem.cat_file(path))


def _stamp(filesystem: fsspec.AbstractFileSystem, path: str) -> str:
    if _is_local(filesystem):
        state = os.stat(path)
        return repr((state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns))
    info = filesystem.info(path)
    told = [str(info[name]) for name in ("ETag", "LastModified", "mtime") if info.get(name)]
    content = [] if told else [hashlib.blake2b(filesystem.cat_file(path)).hexdigest()]
    return repr((info.get("size"), told, content))


def _is_local(filesystem: fsspec.AbstractFileSystem) -> bool:
    return "file" in (filesystem.protocol if isinstance(filesystem.protocol, tuple) else (filesystem.protocol,))
