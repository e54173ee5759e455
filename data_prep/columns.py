"""Names of any script made to fit into columns of a terminal."""

from __future__ import annotations

from rich.cells import cell_len, chop_cells, set_cell_size

WIDER = "\ufe0f"  # asks for the wide form of a character: terminals differ in whether they follow


def printable(text: str) -> str:
    """Return a name as one line in which nothing moves the cursor or joins characters."""
    return "".join(letter if letter.isprintable() else "·" for letter in text.replace(WIDER, ""))


def end_cut(text: str, width: int) -> str:
    """Return a text in at most `width` columns, its end cut off where it is longer."""
    return text if cell_len(text) <= width else set_cell_size(text, max(width - 1, 0)).rstrip() + "…" * (width > 0)


def middle_cut(text: str, width: int) -> str:
    """Return a name in at most `width` columns: where it is longer its middle is left out, as its ends tell most."""
    if cell_len(text) <= width:
        return text
    tail = (width - 1) // 2
    start = set_cell_size(text, width - 1 - tail).rstrip()
    end = chop_cells(text[::-1], tail)[0][::-1] if tail else ""
    return f"{start}…{end}"
