"""A cache on a node's disk of what its processes read from a store, in chunks, each fetched once.

A chunk is a fixed run of a shard's bytes in a file of its own, with its CRC-32 behind it; it is written beside and
renamed, so that a process killed at any moment leaves no half chunk that counts. Whoever needs a chunk first fetches
it under a lock (the kernel's, which goes with its holder); the others wait and find it. When the files pass the
limit, those used longest ago go.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from soratrain.data.remote import Range
from soratrain.errors import ConfigError, DataError

CHUNK = 1 << 20  # bytes
CHECK = 4  # bytes of CRC-32 behind each chunk
STRIPES = 64  # locks that chunks share
FULL = (errno.ENOSPC, errno.EDQUOT)  # of a disk, or of what a user may have of it
KEPT = 0.9  # share of the limit that is left after a clearing

Fetch = Callable[[Sequence[Range]], "list[bytes | DataError]"]


class ChunkCache:
    """Reads ranges through the cache.

    Args:
        folder: on a disk of this node; all its processes name the same.
        limit: bytes that the files may hold.
        name: identifies the shards' bytes; other shards under the same name would be taken for these.
        ends: by shard, the byte after its last sample: no chunk reaches beyond.
        fetch: reads ranges from the store.

    Raises:
        ConfigError: the folder cannot be written: it is read-only, or another user's.
    """

    def __init__(self, folder: str | Path, limit: int, name: str, ends: Mapping[str, int], fetch: Fetch) -> None:
        self.root, self.limit, self.ends, self.fetch = Path(folder), limit, ends, fetch
        self.folder = self.root / hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
        with self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise ConfigError(
                f"data.remote.cache_dir={self.root} cannot be used: {error.strerror or error}; name a folder of your"
                " own on a local disk, or null"
            ) from error

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | DataError]:
        """Return the bytes of each range, or what is damaged about it. Raises StoreError as `fetch` does."""
        with self._usable():
            return self._read_many(ranges)

    def _read_many(self, ranges: Sequence[Range]) -> list[bytes | DataError]:
        wanted = sorted({(shard, number) for one in ranges for shard, number in self._chunks(one)})
        have = {chunk: data for chunk in wanted if (data := self._load(chunk)) is not None}
        missing = [chunk for chunk in wanted if chunk not in have]
        if missing:
            with self._locked(missing):  # in a fixed order, so that no two processes wait for each other
                for chunk in missing:
                    if (data := self._load(chunk)) is not None:  # another process was first
                        have[chunk] = data
                mine = [chunk for chunk in missing if chunk not in have]
                for chunk, found in zip(mine, self.fetch([self._range(*chunk) for chunk in mine]), strict=True):
                    if not isinstance(found, DataError):
                        have[chunk] = found
                        self._store(chunk, found)
        return [self._cut(one, have) for one in ranges]

    def _chunks(self, one: Range) -> Iterator[tuple[str, int]]:
        shard, offset, length = one
        if offset + length <= self.ends.get(shard, 0):  # what lies elsewhere than the manifest says is not kept
            yield from ((shard, number) for number in range(offset // CHUNK, -(-(offset + length) // CHUNK)))

    def _range(self, shard: str, number: int) -> Range:
        return shard, number * CHUNK, min(CHUNK, self.ends[shard] - number * CHUNK)

    def _cut(self, one: Range, have: Mapping[tuple[str, int], bytes]) -> bytes | DataError:
        shard, offset, length = one
        chunks = list(self._chunks(one))
        if not chunks or any(chunk not in have for chunk in chunks):
            return self.fetch([one])[0]  # a shard cut short may still hold this sample
        begins = [chunk[1] * CHUNK for chunk in chunks]
        parts = (memoryview(have[chunk]) for chunk in chunks)
        return b"".join(
            part[max(0, offset - begin) : offset + length - begin] for part, begin in zip(parts, begins, strict=True)
        )

    def _path(self, chunk: tuple[str, int]) -> Path:
        shard = hashlib.blake2b(chunk[0].encode(), digest_size=8).hexdigest()
        return self.folder / shard / f"{chunk[1]:06d}"

    def _load(self, chunk: tuple[str, int]) -> bytes | None:
        """Return a chunk that is here and whole; a damaged one is as good as none."""
        path = self._path(chunk)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except FileNotFoundError:
            return None
        body, check = data[:-CHECK], data[-CHECK:]
        whole = len(body) == self._range(*chunk)[2] and zlib.crc32(body).to_bytes(CHECK, "little") == check
        return body if whole else None

    def _store(self, chunk: tuple[str, int], data: bytes) -> None:
        path = self._path(chunk)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(exist_ok=True)
            with temporary.open("wb") as file:
                file.write(data)
                file.write(zlib.crc32(data).to_bytes(CHECK, "little"))
            os.replace(temporary, path)
            self._count(len(data) + CHECK)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            if error.errno not in FULL:
                raise
            # what was read is still right

    @contextlib.contextmanager
    def _locked(self, chunks: Sequence[tuple[str, int]]) -> Iterator[None]:
        stripes = {zlib.crc32(repr(chunk).encode()) % STRIPES for chunk in chunks}
        with contextlib.ExitStack() as stack:
            for stripe in sorted(stripes):
                file = stack.enter_context((self.folder / f"lock-{stripe:02d}").open("ab"))
                fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _count(self, size: int) -> None:
        """Add to the bytes that all files hold; clear where that passes the limit."""
        with (self.root / "bytes").open("a+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.seek(0)
            said = file.read()
            held = int(said or 0) + size
            if held > self.limit or not said:  # nothing is said at first, and where a process was killed just below
                held = self._clear()
            file.truncate(0)
            file.write(str(held))

    def _clear(self) -> int:
        """Remove the chunks used longest ago, of all shards in the cache; return the bytes that are left."""
        files = []
        for path in self.root.glob("*/*/*"):
            with contextlib.suppress(FileNotFoundError):
                state = path.stat()
                files.append((state.st_mtime_ns, state.st_size, path))
        held = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if held <= KEPT * self.limit:
                break
            path.unlink(missing_ok=True)
            held -= size
        return held
