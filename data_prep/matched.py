"""The account of a table of captions: what matched and what did not, both ways, for stats.json and the terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from soratrain.amounts import counted

SHOWN = 5  # names of those that do not match


@dataclass(frozen=True)
class Matched:
    """What became of a table's rows, and of the input's files.

    Attributes:
        table, column: where the captions came from, and which of its columns named the files.
        rows: how many rows it has; `empty` of those that name a file say nothing of it.
        files: how many files have captions from it; `beside` of these have others beside them, which are not used.
        by: rows that name a file, by how they do.
        no_file: names in rows that mean no file, or not one alone.
        no_row: files that have no caption from it.
    """

    table: str
    column: str
    rows: int
    empty: int
    files: int
    beside: int
    by: dict[str, int]
    no_file: tuple[str, ...]
    no_row: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return the form that stats.json holds: of names that do not match their number, and the first few."""
        return {
            "table": self.table,
            "column": self.column,
            "rows": self.rows,
            "rows_by": self.by,
            "rows_without_text": self.empty,
            "rows_without_file": {"count": len(self.no_file), "first": list(self.no_file[:SHOWN])},
            "files": self.files,
            "files_with_others_beside": self.beside,
            "files_without_row": {"count": len(self.no_row), "first": list(self.no_row[:SHOWN])},
        }

    def lines(self) -> list[str]:
        """Return what the terminal shows."""
        how = ", ".join(f"{count} by {name}" for name, count in self.by.items())
        named = sum(self.by.values())
        said = [f"captions={self.table}: {named} of {self.rows} rows name a file in column {self.column} ({how})"]
        for count, what, names in (
            (len(self.no_file), "rows without a file, or not one alone", self.no_file),
            (len(self.no_row), "files without a caption in it", self.no_row),
            (self.empty, "rows without a text", ()),
            (self.beside, "files with captions beside them as well; those of the table are used", ()),
        ):
            first = f": {', '.join(names[:SHOWN])}{', …' if len(names) > SHOWN else ''}" if names else ""
            said += [f"  {counted(count, what)}{first}"] if count else []
        return said
