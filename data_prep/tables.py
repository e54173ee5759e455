"""A table on disk, row by row: CSV, TSV, JSON lines or parquet, each with one clear line for what is wrong with it."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from soratrain.errors import DataError

LONGEST = 1 << 30  # characters of one cell: captions of a whole film are still captions
BATCH = 4096  # rows of a parquet in memory at once


class Table(Protocol):
    """A table: its columns, and what people call the number of a row in it."""

    path: Path
    columns: list[str]
    counted: str

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each row and its cells in these columns, None where it has none."""


def open_table(path: Path) -> Table:
    """Return the table in a file.

    Raises:
        DataError: there is no such file, it is of a kind that is not known, or its head cannot be read.
    """
    kind = KINDS.get(path.suffix.lower())
    if path.is_dir():
        raise wrong(path, "is a folder; name the table in it")
    if not path.exists():
        raise wrong(path, "does not exist")
    if kind is None:
        raise wrong(path, f"is of no kind that can be read; known names end in {', '.join(KINDS)}")
    try:
        return kind(path)
    except OSError as error:
        raise wrong(path, f"cannot be read: {error.strerror or error}") from error


def wrong(path: Path, what: str) -> DataError:
    """Return the error that says what is wrong with a table."""
    return DataError(f"captions={path}: {what}")


class Delimited:
    """CSV and TSV, as RFC 4180 has them, in UTF-8; of a `.csv` the head tells whether `,`, `;` or a tab divides."""

    counted = "line"

    def __init__(self, path: Path) -> None:
        csv.field_size_limit(LONGEST)
        self.path = path
        self._delimiter = "\t"
        if path.suffix.lower() != ".tsv":
            with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
                head = file.readline()
            self._delimiter = max(",;\t", key=head.count)
        first = next(self._lines(), None)
        if first is None:
            raise wrong(path, "is empty; its first line should name the columns")
        self.columns = [name.strip() for name in first[1]]

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of the last line of each row, and its cells."""
        places = [self.columns.index(name) for name in columns]
        lines = self._lines()
        next(lines)
        for number, cells in lines:
            if len(cells) != len(self.columns):
                what = f"line {number} has {len(cells)} cells and the head {len(self.columns)}"
                raise wrong(self.path, f'{what}; a cell that holds {self._delimiter!r} or a quote stands in "quotes"')
            yield number, [cells[place] for place in places]

    def _lines(self) -> Iterator[tuple[int, list[str]]]:
        """Yield the lines that are not blank, the head among them."""
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, delimiter=self._delimiter, strict=True)
            try:
                for cells in reader:
                    utf8(self.path, f"line {reader.line_num}", cells)
                    if cells:
                        yield reader.line_num, cells
            except csv.Error as error:
                raise wrong(self.path, f"line {reader.line_num} cannot be read: {error}") from error


class Lines:
    """One JSON object a line."""

    counted = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.columns = list(dict.fromkeys(name for _, value in self._objects() for name in value))
        if not self.columns:
            raise wrong(path, "is empty; each of its lines should be a JSON object")

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each line, and its values."""
        for number, value in self._objects():
            yield number, [value.get(name) for name in columns]

    def _objects(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the number of each line that is not blank, and its object."""
        with open(self.path, encoding="utf-8-sig", errors="surrogateescape") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                utf8(self.path, f"line {number}", [line])
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise wrong(self.path, f"line {number} is not JSON: {error}") from error
                if not isinstance(value, dict):
                    raise wrong(self.path, f"line {number} is not a JSON object but {line.strip()[:40]}")
                yield number, value


class Parquet:
    """A parquet file."""

    counted = "row"

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.columns = pq.read_schema(path).names
        except (pa.ArrowException, OSError) as error:
            raise wrong(path, f"cannot be read as parquet: {str(error).splitlines()[0]}") from error

    def rows(self, columns: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        """Yield the number of each row, and its cells."""
        number = 0
        try:
            with pq.ParquetFile(self.path) as file:
                for batch in file.iter_batches(BATCH, columns=list(dict.fromkeys(columns))):
                    cells = [batch.column(name).to_pylist() for name in columns]
                    for row in zip(*cells, strict=True):
                        number += 1
                        yield number, list(row)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            what = str(error).splitlines()[0]
            raise wrong(self.path, f"cannot be read as parquet after row {number}: {what}") from error


def utf8(path: Path, where: str, texts: Sequence[str]) -> None:
    """Raise DataError where a text came from bytes that are no UTF-8."""
    try:
        "".join(texts).encode("utf-8")
    except UnicodeEncodeError as error:
        byte = ord(error.object[error.start]) - 0xDC00
        raise wrong(path, f"{where} is not UTF-8 (byte 0x{byte:02x}); save the table as UTF-8") from error


KINDS: dict[str, type[Delimited] | type[Lines] | type[Parquet]] = {
    ".csv": Delimited,
    ".tsv": Delimited,
    ".jsonl": Lines,
    ".ndjson": Lines,
    ".parquet": Parquet,
}
