"""Captions in a table that came with the data: which columns they stand in, and what each row says of which file."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_prep.matching import cleaned
from data_prep.records import Caption
from data_prep.sidecars import plain
from data_prep.tables import Table, open_table, wrong
from soratrain.errors import DataError

FILE = ("path", "file", "filename", "file_name", "video", "videos", "video_path", "image", "url", "id", "key")
TEXT = ("caption", "captions", "text", "prompt", "description")
TYPES = ("gt", "short", "long", "camera", "tags")
NONE = "none"  # the name of a table or of a column that is not to be read
FOUND = ("metadata.csv", "metadata.jsonl", "metadata.parquet")  # as Hugging Face's datasets names them
FOUND_BY = "file_name"


@dataclass(frozen=True)
class Columns:
    """The columns of a table by what they hold; None is by their names. See conf/data_prep/, `captions_columns`."""

    file: str | None = None
    text: str | None = None
    type: str | None = None
    lang: str | None = None


@dataclass(frozen=True)
class Row:
    """A row of a table: what may name its file, one name a column, and what it says of that file."""

    names: tuple[str, ...]
    captions: tuple[Caption, ...]


@dataclass(frozen=True)
class Captions:
    """What a table says. `columns` are those that may name the file, the likeliest first."""

    path: Path
    columns: tuple[str, ...]
    rows: tuple[Row, ...]


def read(path: Path, columns: Columns) -> Captions:
    """Return the captions in a table.

    Raises:
        DataError: it cannot be read, has no such column, or a cell holds what it should not.
    """
    table = open_table(path)
    files = chosen(table, "file", columns.file, FILE)
    texts = chosen(table, "text", columns.text, TEXT)
    rows = tuple(rows_of(table, files, texts, optional(table, "type", columns), optional(table, "lang", columns)))
    if not rows:
        raise wrong(path, "has no rows")
    return Captions(path, tuple(files), rows)


def found_in(folder: Path, columns: Columns) -> Path | None:
    """Return the table in a folder that Hugging Face's datasets would take; None where there is none.

    Raises:
        DataError: there are several, or it cannot be read.
    """
    there = [folder / name for name in FOUND if (folder / name).is_file()]
    tables = []
    for path in there:
        names = [name.lower() for name in open_table(path).columns]
        text = columns.text is not None or any(name in names for name in TEXT)
        if text and (columns.file is not None or FOUND_BY in names):
            tables.append(path)
    if len(tables) > 1:
        names = [path.name for path in tables]
        raise DataError(f"input={folder} has {' and '.join(names)}; say which, for example captions={tables[0]}")
    return tables[0] if tables else None


def chosen(table: Table, what: str, asked: str | None, known: Sequence[str]) -> list[str]:
    """Return the columns that were asked for, or those whose names are known, in the order in which they are.

    Several are asked for with commas between them, unless there is a column of just that name.
    """
    if asked is not None:
        names = [asked] if asked in table.columns else [name.strip() for name in asked.split(",")]
        missing = [name for name in names if name not in table.columns]
    else:
        by_name = {name.lower(): name for name in reversed(table.columns)}
        names = [by_name[name] for name in known if name in by_name]
        missing = [] if names else [" or ".join(known)]
    if missing:
        there = ", ".join(table.columns)
        raise wrong(table.path, f"has no column {missing[0]}; name one with captions_columns.{what}= ({there})")
    twice = [name for name in names if table.columns.count(name) > 1]
    if twice:
        raise wrong(table.path, f"has several columns {twice[0]}; rename one")
    return names


def optional(table: Table, what: str, columns: Columns) -> str | None:
    """Return the column that holds `what`, if it is there and wanted."""
    asked = getattr(columns, what)
    if asked == NONE or (asked is None and what not in table.columns):
        return None
    return chosen(table, what, asked or what, ())[0]


def rows_of(
    table: Table, files: Sequence[str], texts: Sequence[str], kind: str | None, lang: str | None
) -> Iterator[Row]:
    """Yield the rows of a table."""
    names = list(dict.fromkeys(name for name in (*files, *texts, kind, lang) if name is not None))
    for number, values in table.rows(names):
        place, cells = f"{table.counted} {number}", dict(zip(names, values, strict=True))
        told = {name: text_in(table, place, name, cells[name]) for name in (kind, lang) if name is not None}
        type = (told[kind] if kind else "") or "gt"
        if type not in TYPES:
            what = f"{place}: {kind} {type!r} is no type of caption; use one of {', '.join(TYPES)}"
            raise wrong(table.path, f"{what}, or captions_columns.type={NONE} where the column holds something else")
        captions = [
            Caption(type, text, lang=told[lang] if lang else "")
            for name in texts
            for item in (cells[name] if isinstance(cells[name], list) else [cells[name]])
            if (text := text_in(table, place, name, item))
        ]
        yield Row(tuple(name_in(cells[name]) for name in files), tuple(captions))


def text_in(table: Table, place: str, column: str, cell: Any) -> str:
    """Return the text in a cell; nothing where there is none."""
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return ""
    if not isinstance(cell, str):
        raise wrong(table.path, f"{place}: {column} holds {str(cell)[:40]!r}, which is no text")
    try:
        return plain(cell)
    except ValueError as error:
        raise wrong(table.path, f"{place}: {column} cannot be written as UTF-8: {error}") from error


def name_in(cell: Any) -> str:
    """Return the name of a file in a cell, which may be a number, or a list of one; nothing where it is no name."""
    cell = cell[0] if isinstance(cell, list) and len(cell) == 1 else cell
    if isinstance(cell, float) and cell.is_integer():  # 17.0: a column of numbers with gaps in it
        cell = int(cell)
    return cleaned(str(cell)) if isinstance(cell, str | int) else ""
