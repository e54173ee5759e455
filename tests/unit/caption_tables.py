"""Tables of captions of every kind, and what a build finds in them."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from data_prep.captions import Columns
from data_prep.ingest import find
from data_prep.pack import Report

Rows = list[dict[str, Any]]


def folder_of(path: Path, *names: str) -> Path:
    """Make files of these names, which are enough to be listed."""
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(b"x")
    return path


def table_of(path: Path, rows: Rows) -> Path:
    """Write rows in the form that the name asks for."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    else:
        with open(path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


def captions(
    folder: Path | str, table: Path | str | None, report: Report | None = None, **columns: str
) -> dict[str, Any]:
    """Return (type, text, lang) of each caption of each file."""
    asked = None if table is None else str(table)
    sources, _ = find(str(folder), report or Report(), asked, Columns(**columns))
    return {source.uri: [(item.type, item.text, item.lang) for item in source.captions] for source in sources}


def texts(folder: Path | str, table: Path | str | None, **columns: str) -> dict[str, list[str]]:
    return {uri: [text for _, text, _ in found] for uri, found in captions(folder, table, **columns).items()}


NAMES = {
    "sub/b1.mov": "relative path",
    "./sub//b1.mov": "relative path",
    "sub\\b1.mov": "relative path",
    "clips/sub/b1.mov": "relative path",
    "{clips}/sub/b1.mov": "relative path",
    "elsewhere/b1.mov": "base name",
    "https://host/x/b1.mov?size=3#t": "base name",
    "C:\\data\\b1.mov": "base name",
    "b1": "stem",
    "sub/b1": "stem",
    "b1.webm": "stem",
}
