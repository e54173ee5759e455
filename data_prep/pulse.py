"""A sign of life from a worker process: which file it is at, and that it still gets on with it.

The process that waits looks at two numbers in shared memory; without it (`attach` was not called) nothing happens.
"""

from __future__ import annotations

from collections.abc import MutableSequence

NOWHERE = -1
_cell: MutableSequence[int] | None = None


def attach(cell: MutableSequence[int]) -> None:
    """Show progress in `cell`: the number of the file, and a count that grows as long as work goes on."""
    global _cell
    _cell = cell


def at(file: int) -> None:
    """Say that file number `file` of this unit is begun, or with NOWHERE that none is."""
    if _cell is not None:
        _cell[0] = file
        _cell[1] += 1


def beat() -> None:
    """Say that work goes on: a frame was decoded, a part of a file was read."""
    if _cell is not None:
        _cell[1] += 1
