"""Captions of many clips, found by key: the rows of parquet files, mapped once for all processes of a node."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from soratrain.data.keys import hashed
from soratrain.data.manifest import CAPTION_SCHEMA
from soratrain.data.node import mapped, new_array, shared
from soratrain.data.tables import Part, batches, identity, parts, rows_in
from soratrain.errors import DataError

FORM = 1  # of the files that are mapped


class CaptionTable:
    """Captions by key; make it with `open_captions`. It is pickled as the place where it lies.

    Args:
        home: folder of the mapped files.
    """

    def __init__(self, home: str) -> None:
        self.home = home
        self.hashes, self.rows = mapped(Path(home) / "hash.npy"), mapped(Path(home) / "row.npy")
        files = sorted(Path(home).glob("part-*.arrow"))
        self.tables = [pa.ipc.open_file(pa.memory_map(str(path))).read_all() for path in files]
        self.ends = list(accumulate(map(len, self.tables)))

    def __reduce__(self) -> tuple[Any, ...]:
        return CaptionTable, (self.home,)

    def __len__(self) -> int:
        return len(self.rows)

    def get(self, key: str) -> list[dict[str, str]]:
        """Return the captions of `key`, each a mapping with the columns of CAPTION_SCHEMA, in a fixed order."""
        wanted = hashed(np.array([key.encode()], dtype="S32"))[0]
        low, high = np.searchsorted(self.hashes, wanted, "left"), np.searchsorted(self.hashes, wanted, "right")
        found = [row for number in self.rows[low:high].tolist() if (row := self._row(number))["key"] == key]
        return sorted(found, key=lambda row: [row[name] for name in CAPTION_SCHEMA.names])

    def _row(self, number: int) -> dict[str, str]:
        table = bisect.bisect_right(self.ends, number)
        place = number - (self.ends[table - 1] if table else 0)
        return self.tables[table].slice(place, 1).to_pylist()[0]


def open_captions(folder: str | Path) -> CaptionTable:
    """Return the captions in `folder`, a path or a URL: one revision (`captions/<rev>`), a folder of revisions, or the
    output of a stage that holds `captions/`. Raises DataError where there is none."""
    found = _parts(folder) or parts(str(folder), ["*.parquet", "*/*.parquet"])
    if not found:
        raise DataError(f"{folder} has no captions (*.parquet); make them with `python -m soratrain stage=recaption`")
    return _open(found)


def open_original_captions(folder: str | Path) -> CaptionTable | None:
    """Return the captions that lie beside shards (`captions/<rev>`), or None where there are no such tables."""
    found = _parts(folder)
    return _open(found) if found else None


def read_original_captions(folder: str | Path) -> Iterator[dict[str, str]]:
    """Yield every caption that lies beside shards, as a mapping with the columns of CAPTION_SCHEMA."""
    for part in _parts(folder):
        for batch in batches(part, CAPTION_SCHEMA, CAPTION_SCHEMA.names):
            yield from batch.to_pylist()


def _parts(folder: str | Path) -> list[Part]:
    return parts(str(folder), ["captions/*/*.parquet"])


def _open(found: Sequence[Part]) -> CaptionTable:
    return CaptionTable(str(shared(f"captions-{identity(found, FORM)}", lambda new: _fill(new, found))))


def _fill(new: Path, found: Sequence[Part]) -> None:
    """Write the captions as files that can be mapped, and an index of them by the keys' hashes."""
    count, start = sum(map(rows_in, found)), 0
    hashes = np.empty(count, dtype=np.uint64)
    for number, part in enumerate(found):
        with pa.ipc.new_file(str(new / f"part-{number:05d}.arrow"), CAPTION_SCHEMA) as file:
            for batch in batches(part, CAPTION_SCHEMA, CAPTION_SCHEMA.names):
                keys = batch["key"].to_numpy(zero_copy_only=False).astype("S32")
                hashes[start : start + len(batch)] = hashed(keys)
                start += len(batch)
                file.write_batch(batch)
    order = np.argsort(hashes, kind="stable")
    new_array(new / "row.npy", np.int64, count)[:] = order
    new_array(new / "hash.npy", np.uint64, count)[:] = hashes[order]
