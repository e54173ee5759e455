"""WebDataset tars written byte for byte the same each time, and read back by offset.

A sample is a run of adjacent members `KEY.ext`; nothing in a header depends on the clock, the user or the machine.
"""

from __future__ import annotations

import hashlib
import os
import re
import tarfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from soratrain.data.atomic import sync
from soratrain.data.chunks import ChunkCache
from soratrain.data.remote import Range, Remote, RemoteFolder
from soratrain.errors import DataError

KEY = re.compile(r"[0-9a-f]{32}")
OPEN_FILES = 64  # local shards a reader keeps open


@dataclass(frozen=True)
class Placed:
    """Where a sample was written: its shard's file name, and (offset, length) in bytes of each member by extension."""

    shard: str
    members: dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Shard:
    """A finished shard: file name, size in bytes, number of samples, SHA-256 in hex."""

    name: str
    bytes: int
    samples: int
    sha256: str


class _HashingFile:
    """A file for tarfile that hashes what passes through."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.raw = open(path, "wb")  # noqa: SIM115 - closed with the shard
        self.digest = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.raw.write(data)

    def tell(self) -> int:
        return self.raw.tell()


class ShardWriter:
    """Write samples into `<prefix>-NNNNNN.tar` files under `folder`, a new one when `max_bytes` would be passed.

    A shard is written under a temporary name, flushed to disk and renamed when it is full or the writer closes, so a
    shard that can be seen is whole. After an exception inside `with`, the unfinished one is removed.

        with ShardWriter("data/world", max_bytes=256 << 20) as writer:
            placed = writer.write(key, {"json": header, "mp4": media})   # members in the order given
        writer.finished                                                  # the shards, with checksums

    Args:
        folder: where the shards go; made if it is not there.
        max_bytes: size after which a new shard begins; a single larger sample gets a shard of its own.
        prefix: beginning of each name; give parallel writers different ones.
        start: number of the first shard.
    """

    def __init__(
        self, folder: str | Path, max_bytes: int = 256 << 20, *, prefix: str = "shard", start: int = 0
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.max_bytes = max_bytes
        self.prefix = prefix
        self.number = start
        self.finished: list[Shard] = []
        self._samples = 0
        self._file: _HashingFile | None = None
        self._tar: tarfile.TarFile | None = None

    def write(self, key: str, members: Mapping[str, bytes]) -> Placed:
        """Append one sample and say where its members lie. Raises DataError for a key that is not 32 hex digits."""
        if not KEY.fullmatch(key):
            raise DataError(f"sample key {key!r} is not 32 hex digits; take the first 32 of a hash")
        size = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
        if self._tar is not None and self._tar.offset + size > self.max_bytes:
            self._finish()
        tar = self._open()
        places = {}
        for ext, data in members.items():
            info = tarfile.TarInfo(f"{key}.{ext}")
            info.size, info.mtime, info.mode = len(data), 0, 0o644
            tar.addfile(info, BytesIO(data))
            places[ext] = (tar.offset - -(-len(data) // 512) * 512, len(data))
        self._samples += 1
        return Placed(self._name(), places)

    def close(self) -> None:
        """Finish the last shard."""
        if self._tar is not None:
            self._finish()

    def abort(self) -> None:
        """Remove the unfinished shard; finished ones stay."""
        if self._file is not None:
            self._file.raw.close()
            self._file.path.unlink(missing_ok=True)
        self._file = self._tar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def _name(self) -> str:
        return f"{self.prefix}-{self.number:06d}.tar"

    def _open(self) -> tarfile.TarFile:
        if self._tar is None:
            self._file = _HashingFile(self.folder / f".{self._name()}.{os.getpid()}.tmp")
            self._tar = tarfile.TarFile(fileobj=self._file, mode="w", format=tarfile.PAX_FORMAT)  # type: ignore[arg-type]
            self._samples = 0
        return self._tar

    def _finish(self) -> None:
        assert self._tar is not None and self._file is not None
        self._tar.close()
        file, name = self._file, self._name()
        file.raw.close()
        sync(file.path)
        size = file.path.stat().st_size
        os.replace(file.path, self.folder / name)
        sync(self.folder)
        self.finished.append(Shard(name, size, self._samples, file.digest.hexdigest()))
        self._file = self._tar = None
        self.number += 1


class ShardReader:
    """Read byte ranges of the shards under `folder`: a local path, `s3://…` or `http(s)://…`.

    It can be pickled and forked: files and connections are opened on first use, in the process that uses them.

    Args:
        folder: where the shards are.
        remote: how a store is read, and what is kept of it.
        version: identifies the shards' bytes, for a cache.
        ends: by shard, the byte after its last sample; a cache then asks for no more.
    """

    def __init__(
        self,
        folder: str | Path,
        remote: Remote | None = None,
        *,
        version: str = "",
        ends: Mapping[str, int] | None = None,
    ) -> None:
        self.folder = str(folder).rstrip("/")
        self.settings, self.version, self.ends = remote or Remote(), version, dict(ends or {})
        self.remote = "://" in self.folder and not self.folder.startswith("file://")
        self._files: OrderedDict[str, int] = OrderedDict()
        self._store: RemoteFolder | None = None
        self._cache: ChunkCache | None = None

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`.

        Raises:
            DataError: the shard is missing or shorter.
            StoreError: the store that holds it cannot be read.
        """
        if self.remote:
            found = self._far([(shard, offset, length)])[0]
            if isinstance(found, DataError):
                raise found
            return found
        try:
            data = self._local(shard, offset, length)
        except OSError as error:
            raise DataError(f"{self.folder}/{shard} cannot be read: {error}") from error
        if len(data) != length:
            raise DataError(f"{self.folder}/{shard} ends before byte {offset + length}; write the shards again")
        return data

    def fetch(self, ranges: Sequence[Range]) -> dict[Range, bytes | DataError]:
        """Return the bytes of ranges in a store, all fetched at once, or what is damaged about each."""
        return dict(zip(ranges, self._far(ranges), strict=True))

    def _far(self, ranges: Sequence[Range]) -> list[bytes | DataError]:
        store = self.store
        if self.settings.cache_dir is None:
            return store.read_many(ranges)
        if self._cache is None:
            limit, name = int(self.settings.cache_gb * 1e9), f"{self.folder} {self.version}"
            self._cache = ChunkCache(self.settings.cache_dir, limit, name, self.ends, store.read_many)
        return self._cache.read_many(ranges)

    @property
    def store(self) -> RemoteFolder:
        """The store, opened in this process."""
        if self._store is None or self._store.process != os.getpid():
            self._store, self._cache = RemoteFolder(self.folder, self.settings), None
        return self._store

    def _local(self, shard: str, offset: int, length: int) -> bytes:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = os.open(Path(self.folder.removeprefix("file://")) / shard, os.O_RDONLY)
            if len(self._files) > OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        return os.pread(self._files[shard], length, offset)

    def close(self) -> None:
        """Close the open files; the next read opens them again."""
        while self._files:
            os.close(self._files.popitem()[1])
        self._store, self._cache = None, None

    def __del__(self) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "remote": self.settings, "version": self.version, "ends": self.ends}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
