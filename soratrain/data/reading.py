"""Reading manifests: into arrays in files that all processes of a node share, or as one table of every column."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from soratrain.data.keys import repeated
from soratrain.data.manifest import COLUMNS, MANIFEST_SCHEMA, NUMBERS, Manifest, map_manifest
from soratrain.data.node import new_array, shared
from soratrain.data.tables import Part, batches, content, identity, parts, rows_in
from soratrain.errors import DataError

FORM = 1  # of the files that are mapped


def read_table(folder: str | Path) -> pa.Table:
    """Return the manifest under `folder` (a path or a URL) as an arrow table, rows by (shard, offset).

    Raises DataError where there is no manifest, where a part has other columns, or where a key occurs twice.
    """
    table = pa.Table.from_batches(
        [batch for part in _parts(folder) for batch in batches(part, MANIFEST_SCHEMA, MANIFEST_SCHEMA.names)],
        schema=MANIFEST_SCHEMA,
    )
    table = table.sort_by([("shard", "ascending"), ("media_offset", "ascending")])
    if len(table) != len(table["key"].unique()):
        counts = table["key"].value_counts()
        twice = next(item["values"].as_py() for item in counts if item["counts"].as_py() > 1)
        raise _twice(folder, twice)
    return table


def read_manifest(*folders: str | Path) -> Manifest:
    """Return the manifest under a folder or URL, mapped for all processes of this node; or of several, as one.

    Errors are those of `read_table`.
    """
    found = [(str(folder), _parts(folder)) for folder in folders]
    name = identity([part for _, listed in found for part in listed], [folder for folder, _ in found], FORM)
    home = shared(f"manifest-{name}", lambda new: _fill(new, found))
    return map_manifest(" + ".join(folder for folder, _ in found), str(home))


def described(folder: str | Path) -> dict[str, Any]:
    """Return the `dataset.json` of a folder of shards; an empty one where there is none.

    Raises:
        DataError: it is damaged.
    """
    found = parts(str(folder), ["dataset.json"])
    try:
        value = json.loads(content(found[0])) if found else {}
    except ValueError as error:
        raise DataError(f"{folder}/dataset.json is not JSON ({error}); copy it again") from error
    return value if isinstance(value, dict) else {}


def _parts(folder: str | Path) -> list[Part]:
    found = parts(str(folder), ["manifest/part-*.parquet"])
    if not found:
        raise DataError(
            f"{folder} has no manifest/part-*.parquet; write shards with `python -m data_prep input=… output={folder}`"
        )
    return found


def _twice(folder: str | Path, key: str) -> DataError:
    return DataError(f"{folder}: key {key} occurs twice in the manifest; write the shards again")


def _fill(new: Path, found: Sequence[tuple[str, Sequence[Part]]]) -> None:
    """Write the columns of manifests as files into `new`, folder by folder, in the order of (shard, offset)."""
    starts = [0, *accumulate(sum(map(rows_in, listed)) for _, listed in found)]
    columns = {name: new_array(new / f"{name}.npy", dtype, starts[-1]) for name, dtype in COLUMNS.items()}
    shards: list[str] = []
    exts: dict[str, int] = {}
    for (folder, listed), start, stop in zip(found, starts[:-1], starts[1:], strict=True):
        part = {name: column[start:stop] for name, column in columns.items()}
        names = _read_columns(listed, part, exts)
        after, same = part["shard"][1:] > part["shard"][:-1], part["shard"][1:] == part["shard"][:-1]
        if not (after | same & (part["media_offset"][1:] >= part["media_offset"][:-1])).all():
            order = np.lexsort((part["media_offset"], part["shard"]))
            for column in part.values():
                column[:] = column[order]
        part["shard"] += len(shards)
        shards += [f"{folder.rstrip('/')}/{name}" for name in names] if len(found) > 1 else names
    if (key := repeated(columns["key"])) is not None:
        if len(found) > 1:
            places = ", ".join(folder for folder, _ in found)
            raise DataError(f"key {key} occurs twice in {places}: data sets that are mixed must hold different samples")
        raise _twice(found[0][0], key)
    folders = [(folder, start) for (folder, _), start in zip(found, starts[:-1], strict=True)] if len(found) > 1 else []
    told = {"shards": shards, "exts": list(exts), "folders": folders}
    (new / "names.json").write_text(json.dumps(told), encoding="utf-8")


def _read_columns(listed: Sequence[Part], columns: dict[str, np.ndarray], exts: dict[str, int]) -> list[str]:
    """Fill `columns` from the files of one folder; return the names of its shards, in the order of their numbers."""
    known: dict[str, int] = {}
    start = 0
    for part in listed:
        for batch in batches(part, MANIFEST_SCHEMA, [name for name in MANIFEST_SCHEMA.names if name != "scores"]):
            place = slice(start, start + len(batch))
            columns["key"][place] = batch["key"].to_numpy(zero_copy_only=False).astype("S32")
            columns["image"][place] = pc.equal(batch["kind"], "image").to_numpy(zero_copy_only=False)
            columns["shard"][place] = _numbers(batch["shard"], known)
            columns["ext"][place] = _numbers(batch["ext"], exts)
            for name in NUMBERS:
                columns[name][place] = batch[name].to_numpy()
            start = place.stop
    ordered = {name: number for number, name in enumerate(sorted(known))}
    columns["shard"][:] = np.array([ordered[name] for name in known], dtype=np.int32)[columns["shard"]]
    return sorted(known)


def _numbers(names: pa.Array, known: dict[str, int]) -> np.ndarray:
    """Return a number for each name; `known` learns new ones."""
    coded = names.dictionary_encode()
    numbers = [known.setdefault(name, len(known)) for name in coded.dictionary.to_pylist()]
    return np.array(numbers, dtype=np.int32)[coded.indices.to_numpy()]
