"""Byte ranges of a folder in an object store (`s3://`) or behind a web server (`http(s)://`), through fsspec.

What may pass by itself (5xx, 429, a timeout, a broken connection, a short answer) is tried again, each time after
about twice the wait; what will not (403, a server without ranges) stops the run at once, since a store that is gone
must not look like many damaged samples. A missing file or one that ends too early is damage: DataError.
Waits are jittered by a hash of what is read: many processes do not come back together, and no random state moves.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar
from urllib.parse import quote

from fsspec.asyn import sync

from soratrain.data.filesystem import may_pass, open_filesystem, status_of
from soratrain.errors import ConfigError, DataError, StoreError, UserError

log = logging.getLogger(__name__)

SAID = dict[str, float]()  # when this process last said that a store does not answer, by store
SAY_EVERY = 60.0  # seconds; many reads fail at once, which one line tells
LONGEST_WAIT = 30.0  # seconds between two tries
GAP = 64 << 10  # bytes; ranges this close are read as one
RUN = 16 << 20  # bytes; the longest read

P = ParamSpec("P")
T = TypeVar("T")
Range = tuple[str, int, int]  # shard, offset, length


@dataclass(frozen=True)
class Remote:
    """How shards in a store are read.

    Attributes:
        retries: further tries of a read that failed for a reason that may pass.
        timeout: seconds that a connection, and then each answer, may keep silent.
        backoff: seconds before the second try; twice as long before each further one, up to half a minute.
        requests: reads of one process that are under way at a time.
        ahead_mb: megabytes that each loader process reads ahead of need; 0 reads a micro-batch when it is asked for.
        cache_dir: folder on a disk of the node where all its processes keep what they read (`ChunkCache`), or None.
        cache_gb: gigabytes that may lie there.

    Raises:
        ConfigError: a value that cannot work.
    """

    retries: int = 8
    timeout: float = 60.0
    backoff: float = 0.25
    requests: int = 16
    ahead_mb: float = 64.0
    cache_dir: str | None = None
    cache_gb: float = 50.0

    def __post_init__(self) -> None:
        for name, least in (("retries", 0), ("backoff", 0), ("requests", 1), ("ahead_mb", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"data.remote.{name}={getattr(self, name)}: must be at least {least}")
        for name in ("timeout", "cache_gb"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"data.remote.{name}={getattr(self, name)}: must be more than 0")

    def wait(self, place: str, attempt: int, error: Exception, *key: object) -> float:
        """Return how many seconds to wait after try number `attempt` (from 0) to read `place` failed with `error`.

        Raises:
            StoreError: there is no point in trying again.
        """
        status = status_of(error)
        reason = f"status {status}" if status else f"{type(error).__name__} {error}".strip()
        if isinstance(error, PermissionError) or status in (401, 403):
            raise StoreError(f"{place} may not be read ({reason}): check the credentials") from error
        if not may_pass(error):
            raise StoreError(f"{place} cannot be read: {reason}") from error
        if attempt == self.retries:
            raise StoreError(
                f"{place} cannot be read: {reason}, {attempt + 1} times; the same command goes on once the"
                " store answers (data.remote.retries, data.remote.timeout)"
            ) from error
        if attempt == 0:
            self._say(place, reason)
        jitter = zlib.crc32(repr((place, key, os.getpid(), attempt)).encode()) / 2**32
        return min(LONGEST_WAIT, self.backoff * 2**attempt) * (0.5 + jitter)

    def _say(self, place: str, reason: str) -> None:
        store, now = "/".join(place.split("/")[:3]), time.monotonic()
        if now - SAID.get(store, -SAY_EVERY) >= SAY_EVERY:
            SAID[store] = now
            log.warning("%s: no answer (%s); trying again, up to %d times", place, reason, self.retries)


def patient(read: Callable[P, T]) -> Callable[P, T]:
    """Let `read`, whose first argument is a folder or URL, try again as `Remote()` says where that is in a store.

    Raises:
        StoreError: the store cannot be read.
    """

    @functools.wraps(read)
    def tried(*args: P.args, **kwargs: P.kwargs) -> T:
        place, remote, attempt = str(args[0]), Remote(), 0
        while True:
            try:
                return read(*args, **kwargs)
            except UserError:
                raise
            except Exception as error:  # noqa: BLE001 - each library has its own
                if "://" not in place:
                    raise
                time.sleep(remote.wait(place, attempt, error))
            attempt += 1

    return tried


class RemoteFolder:
    """Reads ranges of the files in one folder of a store; make one per process."""

    def __init__(self, url: str, remote: Remote) -> None:
        self.url, self.remote, self.process = url.rstrip("/"), remote, os.getpid()
        self.fetched = 0  # bytes, for those who count
        self._filesystem, self._root = open_filesystem(self.url, remote.timeout)

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`. Raises DataError for a damaged shard, StoreError for the store's fault."""
        found = self.read_many([(shard, offset, length)])[0]
        if isinstance(found, BaseException):
            raise found
        return found

    def read_many(self, ranges: Sequence[Range]) -> list[bytes | DataError]:
        """Return the bytes of each range, read several at a time, neighbours as one; or what is damaged about it.

        Raises:
            StoreError: the store cannot be read.
        """
        filesystem = self._filesystem
        if not getattr(filesystem, "async_impl", False):
            return [self._plainly(*one) for one in ranges]
        return sync(filesystem.loop, self._gather, ranges)

    def _plainly(self, shard: str, offset: int, length: int) -> bytes | DataError:
        try:
            data = self._filesystem.cat_file(self._path(shard), start=offset, end=offset + length)
        except OSError as error:
            return DataError(f"{self.url}/{shard} cannot be read: {error}")
        self.fetched += len(data)
        return data if len(data) == length else self._ends(shard, offset + length)

    async def _gather(self, ranges: Sequence[Range]) -> list[bytes | DataError]:
        gate, found = asyncio.Semaphore(self.remote.requests), dict[Range, bytes | DataError]()

        async def fetch(run: list[Range]) -> None:
            shard, start = run[0][:2]
            end = max(offset + length for _, offset, length in run)
            async with gate:
                data = await self._fetch(shard, start, end - start)
            if isinstance(data, DataError) and len(run) > 1:  # perhaps one of them is whole
                for one in run:
                    await fetch([one])
                return
            for one in run:
                whole = isinstance(data, DataError)
                found[one] = data if whole else data[one[1] - start : one[1] - start + one[2]]  # type: ignore[index]

        tasks = [asyncio.ensure_future(fetch(run)) for run in merged(ranges)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
        return [found[one] for one in ranges]

    async def _fetch(self, shard: str, offset: int, length: int) -> bytes | DataError:
        """Return a range, tried as often as the settings say."""
        place = f"{self.url}/{shard}"
        for attempt in range(self.remote.retries + 1):
            try:
                data = await self._filesystem._cat_file(self._path(shard), start=offset, end=offset + length)
                self.fetched += len(data)
                if len(data) == length:
                    return data
                if attempt:  # twice the same: it is the file that is short
                    return self._ends(shard, offset + length)
                continue
            except Exception as error:  # noqa: BLE001 - each library has its own; all leave here as one of two
                if isinstance(error, FileNotFoundError) or status_of(error) == 404:
                    return DataError(f"{place} cannot be read: there is no such file")
                if status_of(error) == 416:
                    return self._ends(shard, offset + length)
                wait = self.remote.wait(place, attempt, error, offset)
            await asyncio.sleep(wait)
        return self._ends(shard, offset + length)

    def _ends(self, shard: str, end: int) -> DataError:
        return DataError(f"{self.url}/{shard} ends before byte {end}; write the shards again")

    def _path(self, shard: str) -> str:
        return f"{self._root}/{quote(shard) if self.url.startswith('http') else shard}"


def merged(ranges: Sequence[Range]) -> list[list[Range]]:
    """Return the distinct ranges in order, those that lie close to each other together."""
    runs: list[list[Range]] = []
    end = 0
    for one in sorted(set(ranges)):
        shard, offset, length = one
        near = bool(runs) and runs[-1][0][0] == shard and offset <= end + GAP
        if near and max(end, offset + length) - runs[-1][0][1] <= RUN:
            runs[-1].append(one)
            end = max(end, offset + length)
        else:
            runs.append([one])
            end = offset + length
    return runs
