"""Shards in a store are read ahead of need, in few long reads, and no further than was said."""

from __future__ import annotations

import pickle
import threading

import pytest
from data_tiny import write_latents
from range_server import serving
from test_data_loader import SHAPES, cached, same

from soratrain.data.ahead import LONGEST, ReadAhead
from soratrain.data.remote import Remote
from soratrain.errors import DataError, StoreError


class Store:
    """A far reader in memory; `gate` holds the fetches of the background back, `broken` are shards it cannot read."""

    remote = True

    def __init__(self) -> None:
        self.fetched: list[list[int]] = []
        self.read_alone: list[int] = []
        self.broken: set[int] = set()
        self.gate = threading.Event()
        self.gate.set()

    def fetch(self, ranges):
        self.gate.wait(5)
        self.fetched.append([offset for _, offset, _ in ranges])
        if self.broken & set(self.fetched[-1]):
            raise StoreError("gone")
        return {one: DataError("cut short") if one[1] == 7 else bytes(one[2]) for one in ranges}

    def read(self, shard, offset, length):
        self.read_alone.append(offset)
        return bytes(length)

    def close(self) -> None: ...


def wanted(number: int) -> list[tuple[str, int, int]]:
    """Return one range of 10 bytes, whose offset says whose it is."""
    return [("a.tar", number, 10)]


def settle() -> None:
    for thread in threading.enumerate():
        if thread.name == "ahead":
            thread.join(5)


def test_the_first_comes_at_once_and_what_follows_in_groups_of_half_the_limit():
    store = Store()
    ahead = ReadAhead(store, 60)
    for number in range(5):
        ahead.reach(number, wanted, every=1, end=100)
        assert ahead.read("a.tar", number, 10) == bytes(10)
        settle()
    assert store.fetched == [[0], [1, 2, 3], [4, 5, 6], [7, 8, 9]] and not store.read_alone


def test_the_next_group_is_on_its_way_while_this_one_is_used():
    store = Store()
    ahead = ReadAhead(store, 20)
    ahead.reach(0, wanted, every=1, end=None)
    settle()
    store.gate.clear()
    ahead.reach(1, wanted, every=1, end=None)  # returns, though the fetch of 2 cannot
    assert ahead.read("a.tar", 1, 10) == bytes(10) and store.fetched == [[0], [1]]
    store.gate.set()
    ahead.reach(2, wanted, every=1, end=None)
    assert store.fetched[2] == [2]


def test_a_process_fetches_its_own_micro_batches_and_none_beyond_the_end():
    store = Store()
    ahead = ReadAhead(store, 1000)
    for number in (2, 5, 8):
        ahead.reach(number, wanted, every=3, end=10)
    settle()
    assert store.fetched == [[2], [5, 8]]


def test_nothing_is_ahead_where_the_limit_is_0_and_a_jump_forgets_what_was():
    store = Store()
    ahead = ReadAhead(store, 0)
    for number in range(3):
        ahead.reach(number, wanted, every=1, end=100)
    assert store.fetched == [[0], [1], [2]]
    ahead = ReadAhead(store, 40)
    ahead.reach(10, wanted, every=1, end=100)
    ahead.reach(50, wanted, every=1, end=100)
    settle()
    assert [50] in store.fetched and [51, 52] in store.fetched


def test_a_store_that_fails_is_told_when_its_bytes_are_needed_not_before():
    store = Store()
    store.broken = {3}
    ahead = ReadAhead(store, 40)
    for number in range(3):
        ahead.reach(number, wanted, every=1, end=100)
        settle()
    with pytest.raises(StoreError, match="gone"):
        ahead.reach(3, wanted, every=1, end=100)


def test_damage_is_the_damaged_range_alone_and_what_was_not_foreseen_is_read_alone():
    store = Store()
    ahead = ReadAhead(store, 0)
    ahead.reach(7, lambda number: [("a.tar", 7, 10), ("a.tar", 8, 10)], every=1, end=100)
    with pytest.raises(DataError, match="cut short"):
        ahead.read("a.tar", 7, 10)
    assert ahead.read("a.tar", 8, 10) == bytes(10) and ahead.read("a.tar", 99, 5) == bytes(5)
    assert store.read_alone == [99]


def test_micro_batches_that_need_nothing_are_not_looked_through_without_end():
    ahead = ReadAhead(Store(), 1000)
    seen = []
    ahead.reach(0, lambda number: seen.append(number) or [], every=1, end=None)
    assert len(seen) == 1 + LONGEST


def test_a_reader_goes_to_another_process_without_what_it_holds(tmp_path):
    ahead = ReadAhead(Store.__new__(Store), 40)
    ahead._here = {("a.tar", 0, 10): bytes(10)}
    assert pickle.loads(pickle.dumps(ahead)).limit == 40 and len(pickle.dumps(ahead)) < 300


@pytest.mark.parametrize("workers", [0, 2])
def test_reading_ahead_asks_less_often_and_gives_the_same_batches(tmp_path, workers):
    folder = write_latents(tmp_path, SHAPES)
    local, asked = list(cached(str(folder)).loader(0, 6)), {}
    with serving(tmp_path) as server:
        for megabytes in (0, 64):
            data = cached(server.url, workers=workers, remote=Remote(ahead_mb=megabytes), cache=0)
            data.items()
            server.asked.clear()
            far = list(data.loader(0, 6))
            asked[megabytes] = len(server.asked)
            assert all(same(a, b) for a, b in zip(local, far, strict=True)) and len(far) == 6
    assert asked[64] < asked[0]
