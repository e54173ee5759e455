"""Promises about numbers that people read."""

from __future__ import annotations

from soratrain.amounts import counted


def test_one_thing_is_named_in_the_singular() -> None:
    assert [counted(number, "clips") for number in (0, 1, 2, 12000)] == ["0 clips", "1 clip", "2 clips", "12,000 clips"]
    assert counted(1, "rows without a text") == "1 row without a text"
