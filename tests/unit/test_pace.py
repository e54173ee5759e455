"""A long job tells how far it is: once where a bar is shown, now and then where there is no terminal."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from soratrain.stages import pace
from soratrain.stages.pace import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, as it is set."""
    now = [0.0]
    monkeypatch.setattr(pace.time, "monotonic", lambda: now[0])
    return now


def lines(work: Pace, clock: list[float], seconds: list[float], clips: int = 10) -> list[str]:
    found = []
    for each in seconds:
        clock[0] += each
        if said := work.step(clips, clips):
            found.append(said)
    return found


def test_without_a_terminal_a_line_comes_now_and_then_with_the_time_left_corrected(clock: list[float]) -> None:
    said = lines(Pace(100, 100, every=15.0), clock, [0, 5, 15, 20, 10, 10, 10, 10, 10, 10])
    assert said == [
        "about 0:00:40 more at 2 clips/s",  # 80 clips, of which the first 10 after the one that warms up took 5 s
        "30/100 clips, 30 %; about 0:01:10 more at 1 clips/s",  # all so far: 20 in 20 s
        "40/100 clips, 40 %; about 0:01:20 more at 0.75 clips/s",
        "60/100 clips, 60 %; about 0:00:48 more at 0.833 clips/s",
        "80/100 clips, 80 %; about 0:00:23 more at 0.875 clips/s",
    ]  # and none at the end, where the result is said


def test_where_a_bar_is_shown_the_speed_is_said_once(clock: list[float]) -> None:
    assert len(lines(Pace(100, 100, every=math.inf), clock, [0.0, *[60.0] * 9])) == 1


@pytest.mark.parametrize(("terminal", "every"), [(False, 15.0), (True, math.inf)])
def test_how_often_is_by_whether_a_bar_is_shown(monkeypatch: pytest.MonkeyPatch, terminal: bool, every: float) -> None:
    monkeypatch.setattr(pace, "get_console", lambda: Console(force_terminal=terminal))
    assert Pace(10, 10).every == every


def test_what_was_done_before_is_not_left_and_says_nothing_of_the_speed(clock: list[float]) -> None:
    work = Pace(100, 100, 2, every=15.0)
    work.skip(40, 40)
    said = lines(work, clock, [0, 10, 20])
    assert said == [
        "about 0:00:40 more at 2 clips/s",
        "70/100 clips of rank 0 of 2, 70 %; about 0:00:45 more at 1.33 clips/s",
    ]
