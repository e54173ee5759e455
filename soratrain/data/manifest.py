"""The two tables that cross a border: the manifest of a folder of shards, and captions joined to it by key.

Their columns and dtypes are fixed here and nowhere else. A manifest row is one sample (a clip, an image or a cached
latent); all lengths and offsets are bytes inside its shard, so that a sample is read by two numbers.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from soratrain.data.atomic import replacing
from soratrain.data.node import mapped
from soratrain.errors import DataError

MANIFEST_SCHEMA = pa.schema(
    [
        pa.field("key", pa.string(), nullable=False),  # 32 hex digits
        pa.field("shard", pa.string(), nullable=False),  # file name of the tar beside manifest/
        pa.field("kind", pa.string(), nullable=False),  # "video" or "image"
        pa.field("ext", pa.string(), nullable=False),  # of the media member: mp4, jpg, png, webp, safetensors
        pa.field("w", pa.int32(), nullable=False),  # pixels, also where the member is a latent
        pa.field("h", pa.int32(), nullable=False),
        pa.field("frames", pa.int32(), nullable=False),
        pa.field("fps_num", pa.int32(), nullable=False),
        pa.field("fps_den", pa.int32(), nullable=False),
        pa.field("json_offset", pa.int64(), nullable=False),
        pa.field("json_length", pa.int64(), nullable=False),
        pa.field("media_offset", pa.int64(), nullable=False),
        pa.field("media_length", pa.int64(), nullable=False),
        pa.field("crc32", pa.int64(), nullable=False),  # of the media member
        pa.field("scores", pa.string(), nullable=False),  # a JSON object
    ]
)
CAPTION_SCHEMA = pa.schema(
    [pa.field(name, pa.string(), nullable=False) for name in ("key", "type", "text", "model", "rev", "lang")]
)
KINDS = ("video", "image")


@dataclass(frozen=True)
class Row:
    """One sample of a manifest; the fields are the table's columns without `scores`."""

    key: str
    shard: str
    kind: str
    ext: str
    w: int
    h: int
    frames: int
    fps_num: int
    fps_den: int
    json_offset: int
    json_length: int
    media_offset: int
    media_length: int
    crc32: int

    @property
    def fps(self) -> float:
        """Frames per second."""
        return self.fps_num / self.fps_den


@dataclass(frozen=True)
class Manifest:
    """A manifest in memory: one numpy array a column, rows in the order of (shard, offset).

    Attributes:
        folder: where the shards are, a path or a URL.
        key: bytes `S32`, [N].
        shards, exts: names; `shard` and `ext` [N] index them.
        image: whether a sample is a still image, bool [N].
        The other columns are as in MANIFEST_SCHEMA, [N].
        folders: where there are several, each with the number of its first sample; shards are then whole paths.
        home: folder of files that hold the columns, where they are mapped and not in this process's memory.
    """

    folder: str
    key: np.ndarray
    shards: tuple[str, ...]
    shard: np.ndarray
    exts: tuple[str, ...]
    ext: np.ndarray
    image: np.ndarray
    w: np.ndarray
    h: np.ndarray
    frames: np.ndarray
    fps_num: np.ndarray
    fps_den: np.ndarray
    json_offset: np.ndarray
    json_length: np.ndarray
    media_offset: np.ndarray
    media_length: np.ndarray
    crc32: np.ndarray
    folders: tuple[tuple[str, int], ...] = ()
    home: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place of mapped columns instead of what is in them."""
        if self.home is not None:
            return map_manifest, (self.folder, self.home)
        return Manifest, tuple(getattr(self, item.name) for item in fields(self))

    @property
    def sets(self) -> tuple[Manifest, ...]:
        """The samples of each folder, one after another; shards are named as in the whole."""
        if not self.folders:
            return (self,)
        starts = [start for _, start in self.folders]
        spans = zip(self.folders, [*starts[1:], len(self)], strict=True)
        return tuple(
            replace(
                self,
                folder=folder,
                folders=(),
                home=None,
                **{name: getattr(self, name)[start:stop] for name in COLUMNS},
            )
            for (folder, start), stop in spans
        )

    def __len__(self) -> int:
        return len(self.key)

    def row(self, index: int) -> Row:
        """Return sample `index`."""
        numbers = {name: int(getattr(self, name)[index]) for name in NUMBERS}
        return Row(
            key=self.key[index].decode(),
            shard=self.shards[self.shard[index]],
            kind=KINDS[int(self.image[index])],
            ext=self.exts[self.ext[index]],
            **numbers,
        )

    def rows(self) -> Iterator[Row]:
        """Iterate over all samples in order."""
        return (self.row(index) for index in range(len(self)))

    @cached_property
    def hash(self) -> str:
        """Identify the dataset: what is in it and in which order, not where the folder is."""
        return self._digest("key", "image", "w", "h", "frames", "fps_num", "fps_den", "crc32")

    @cached_property
    def placed(self) -> str:
        """Identify the shards' bytes: the same samples may lie elsewhere in them once they are written again."""
        places = ("shard", "json_offset", "json_length", "media_offset", "media_length")
        return self._digest("key", "crc32", *places)

    def _digest(self, *names: str) -> str:
        digest = hashlib.blake2b(digest_size=16)
        for name in names:
            digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
        return digest.hexdigest()


NUMBERS = tuple(name for name in Row.__dataclass_fields__ if name not in ("key", "shard", "kind", "ext"))
COLUMNS: dict[str, Any] = {"key": "S32", "shard": np.int32, "ext": np.int32, "image": np.bool_}
COLUMNS |= {name: MANIFEST_SCHEMA.field(name).type.to_pandas_dtype() for name in NUMBERS}


def map_manifest(folder: str, home: str) -> Manifest:
    """Return the manifest whose columns are files in `home`."""
    told = json.loads((Path(home) / "names.json").read_text(encoding="utf-8"))
    columns: dict[str, Any] = {name: mapped(Path(home) / f"{name}.npy") for name in COLUMNS}
    folders = tuple((name, start) for name, start in told["folders"])
    names: dict[str, Any] = {"shards": tuple(told["shards"]), "exts": tuple(told["exts"])}
    return Manifest(folder=folder, folders=folders, home=home, **names, **columns)


def write_manifest(
    folder: str | Path, rows: Iterable[Mapping[str, Any]], part: int = 0, told: Mapping[str, str] | None = None
) -> Path:
    """Write `manifest/part-NNNNN.parquet` under `folder`, atomically, and return its path.

    What is `told` beside the rows is in the metadata of the file's schema.

    A row is a mapping with exactly the columns of MANIFEST_SCHEMA. Raises DataError for a missing or unknown column,
    a value of another type, or a kind that is not known.
    """
    rows = list(rows)
    for row in rows:
        if row.get("kind") not in KINDS:
            raise DataError(f"manifest row {row.get('key')}: kind={row.get('kind')!r}; use one of {', '.join(KINDS)}")
    return _write(Path(folder) / "manifest" / f"part-{part:05d}.parquet", rows, MANIFEST_SCHEMA.with_metadata(told))


def write_captions(path: str | Path, rows: Iterable[Mapping[str, str]]) -> Path:
    """Write one parquet file of captions (`captions/<rev>/part-NNNNN.parquet`), atomically, and return its path."""
    return _write(Path(path), list(rows), CAPTION_SCHEMA)


def _write(path: Path, rows: Sequence[Mapping[str, Any]], schema: pa.Schema) -> Path:
    for row in rows:
        if set(row) != set(schema.names):
            wrong = sorted(set(row) ^ set(schema.names))
            raise DataError(f"{path.name}: row {row.get('key')} has missing or unknown columns {wrong}")
    try:
        columns = [pa.array([row[field.name] for row in rows], field.type) for field in schema]
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
        raise DataError(f"{path.name}: a value does not fit its column: {error}") from error
    for field, column in zip(schema, columns, strict=True):
        if column.null_count:
            raise DataError(f"{path.name}: a value of column {field.name} is missing; every column needs one")
    with replacing(path) as temporary:
        pq.write_table(pa.Table.from_arrays(columns, schema=schema), temporary, compression="zstd")
    return path
