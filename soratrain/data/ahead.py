"""Reading ahead from a store: the bytes of the coming micro-batches are fetched while those before them are used.

What a rank needs next lies in one stretch of the shards (`Streams`), so the ranges of many micro-batches, asked for
together, join into a few long reads, where those of each alone would be many short ones.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Protocol

from soratrain.data.remote import Range
from soratrain.errors import DataError

LONGEST = 256  # micro-batches fetched together, however few bytes they need

Found = Mapping[Range, "bytes | DataError"]


class Reader(Protocol):
    """Reads byte ranges of shards; see `ShardReader`."""

    def read(self, shard: str, offset: int, length: int) -> bytes: ...

    def close(self) -> None: ...


class FarReader(Reader, Protocol):
    """Reads many ranges at once too, if its shards are in a store."""

    @property
    def remote(self) -> bool:
        """Whether they are."""
        ...

    def fetch(self, ranges: Sequence[Range]) -> Found: ...


@dataclass(frozen=True)
class _Group:
    """Micro-batches whose bytes are fetched together."""

    numbers: range
    found: Future[Found]


class ReadAhead:
    """A reader that has at hand, or on its way, what the coming micro-batches of this process need.

    Args:
        reader: of the shards.
        limit: bytes held for micro-batches after the one at hand; 0 fetches each when it is asked for.
    """

    def __init__(self, reader: FarReader, limit: int) -> None:
        self.reader, self.limit = reader, limit
        self._numbers: range = range(0)
        self._here: Found = {}
        self._coming: _Group | None = None

    def reach(self, number: int, wanted: Callable[[int], Sequence[Range]], *, every: int, end: int | None) -> None:
        """Have at hand what micro-batch `number` needs, and set out for the next ones.

        Args:
            number: of the micro-batch.
            wanted: the ranges that a micro-batch needs.
            every: this process's micro-batches are so far apart.
            end: the number after the last micro-batch that will be asked for, if that is known.

        Raises:
            StoreError: the store cannot be read.
        """
        if number in self._numbers:
            return
        coming, self._coming = self._coming, None
        if coming is not None and number in coming.numbers:
            self._here, self._numbers = coming.found.result(), coming.numbers
        else:  # the first: nothing but this one, so that training begins at once
            self._here, self._numbers = self.reader.fetch(wanted(number)), range(number, number + 1)
        self._coming = self._set_out(range(self._numbers[-1] + every, end or 2**63, every), wanted)

    def _set_out(self, numbers: range, wanted: Callable[[int], Sequence[Range]]) -> _Group | None:
        """Fetch in the background for as many of `numbers` as half the limit holds; the other half is in use."""
        ranges: list[Range] = []
        count = held = 0
        for number in numbers[:LONGEST] if self.limit else ():
            more = wanted(number)
            held += sum(length for _, _, length in more)
            if count and held > self.limit / 2:
                break
            ranges.extend(more)
            count += 1
        if not count:
            return None
        group = _Group(numbers[:count], Future())

        def work() -> None:
            try:
                group.found.set_result(self.reader.fetch(ranges))
            except BaseException as error:  # noqa: BLE001 - raised where the bytes are needed
                group.found.set_exception(error)

        threading.Thread(target=work, name="ahead", daemon=True).start()  # a daemon: the end does not wait for it
        return group

    def read(self, shard: str, offset: int, length: int) -> bytes:
        """Return `length` bytes at `offset`; errors are those of `ShardReader.read`."""
        found = self._here.get((shard, offset, length))
        if isinstance(found, DataError):
            raise found
        return self.reader.read(shard, offset, length) if found is None else found

    def close(self) -> None:
        """Close what is open and forget what was fetched."""
        self._numbers, self._here, self._coming = range(0), {}, None
        self.reader.close()

    def __getstate__(self) -> dict[str, Any]:
        return {"reader": self.reader, "limit": self.limit}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]
