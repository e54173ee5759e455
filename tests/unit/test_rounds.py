"""Ranks with unlike amounts of work wait for each other a round at a time."""

from __future__ import annotations

import threading
from functools import partial
from types import SimpleNamespace

import pytest

from soratrain.distributed import rounds
from soratrain.distributed.rounds import ROUND, Rounds


def test_who_has_done_his_part_waits_for_the_others_no_longer_than_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    now, barrier, moves = 0.0, threading.Barrier(2), [0, 0]
    said: list[list[tuple[float, bool]]] = [[], []]

    def gather(done: bool, rank: int) -> list[bool]:
        said[rank].append((now, done))
        barrier.wait(30)
        answers = [said[0][-1][1], said[1][-1][1]]
        barrier.wait(30)
        return answers

    def moved(rank: int) -> None:
        moves[rank] += 1

    monkeypatch.setattr(rounds, "gather", gather)
    monkeypatch.setattr(rounds, "time", SimpleNamespace(monotonic=lambda: now))
    busy, idle = (Rounds(rank, partial(moved, rank)) for rank in (0, 1))
    other = threading.Thread(target=idle.end)
    other.start()
    for _ in range(7):
        now += ROUND / 2
        busy.go_on()
    busy.end()
    other.join(30)
    assert not other.is_alive()
    assert said[0] == [(ROUND, False), (2 * ROUND, False), (3 * ROUND, False), (3.5 * ROUND, True)]
    assert [done for _, done in said[1]] == [True] * 4
    assert moves == [7, 3]
