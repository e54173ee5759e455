"""Shards behind a web server that answers well, badly, late or not at all."""

from __future__ import annotations

import time

import pytest
from data_tiny import key, write_clips, write_latents
from range_server import serving
from test_data_loader import SHAPES, cached, same, video

from soratrain.data.manifest import write_manifest
from soratrain.data.reading import read_manifest
from soratrain.data.remote import GAP, Remote, RemoteFolder, merged
from soratrain.errors import ConfigError, DataError, StoreError

QUICK = Remote(retries=3, timeout=0.3, backoff=0.01)
BYTES = bytes(range(256)) * 40


@pytest.fixture
def store(tmp_path):
    (tmp_path / "a.tar").write_bytes(BYTES)
    with serving(tmp_path) as server:
        yield server


def read(server, offset: int = 300, length: int = 1000, remote: Remote = QUICK) -> bytes:
    return RemoteFolder(server.url, remote).read("a.tar", offset, length)


@pytest.mark.parametrize(
    "faults", [[503], [500, 502, 429], ["short"], ["reset", "reset"], ["slow"], [503, "reset", "short"]], ids=str
)
def test_what_may_pass_is_tried_again_and_gives_the_right_bytes(store, faults):
    store.faults = list(faults)
    assert read(store) == BYTES[300:1300]
    assert len(store.asked) == len(faults) + 1


@pytest.mark.parametrize("fault, reason", [(503, "status 503"), ("reset", "Disconnected"), ("slow", "Timeout")])
def test_a_store_that_stays_away_is_one_clear_error_after_the_last_try(store, fault, reason):
    store.always = fault
    with pytest.raises(StoreError, match=f"{reason}.*3 times; the same command goes on"):
        read(store, remote=Remote(retries=2, timeout=0.1, backoff=0.01))
    assert len(store.asked) == (6 if fault == "reset" else 3)  # aiohttp itself asks twice where a connection breaks


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_forbidden_is_an_error_at_once(store, status):
    store.always = status
    with pytest.raises(StoreError, match="check the credentials"):
        read(store)
    assert len(store.asked) == 1


def test_a_missing_shard_is_damage_and_not_asked_for_again(store):
    with pytest.raises(DataError, match="b.tar cannot be read: there is no such file"):
        RemoteFolder(store.url, QUICK).read("b.tar", 0, 1)
    assert len(store.asked) == 1


@pytest.mark.parametrize("offset", [len(BYTES) - 10, len(BYTES) + 10])
def test_a_shard_that_ends_too_early_is_damage(store, offset):
    with pytest.raises(DataError, match=f"a.tar ends before byte {offset + 100}"):
        read(store, offset, 100)


def test_a_server_without_ranges_is_refused_unless_all_of_the_file_was_wanted(store):
    store.always = "whole"
    with pytest.raises(StoreError, match="answers a range with status 200 and the whole file"):
        read(store)
    with pytest.raises(StoreError, match="the whole file"):
        read(store, 10, len(BYTES) - 10)  # as many bytes as asked for would not be the same ones
    assert read(store, 0, len(BYTES)) == BYTES


def test_the_wait_doubles(store):
    store.faults = [503] * 4
    began = time.monotonic()
    read(store, remote=Remote(retries=4, backoff=0.05))
    assert 0.5 * 0.75 <= time.monotonic() - began < 0.05 * 15 * 1.5 + 1


def test_a_store_that_does_not_answer_is_said_once_however_many_reads_wait_for_it(store, caplog, monkeypatch):
    monkeypatch.setattr("soratrain.data.remote.SAID", {})
    monkeypatch.setattr("soratrain.data.remote.SAY_EVERY", float("inf"))  # however long a busy machine takes
    store.faults = [503] * 3
    with caplog.at_level("WARNING", logger="soratrain"):
        RemoteFolder(store.url, QUICK).read_many([("a.tar", 0, 50)])
        store.faults = [503] * 2
        read(store)
    said = [record.message for record in caplog.records]
    assert said == [f"{store.url}/a.tar: no answer (status 503); trying again, up to 3 times"]


def test_ranges_close_to_each_other_are_one_read_and_damage_of_one_spares_the_others(store):
    wanted = [("a.tar", 9000, 100), ("a.tar", 0, 50), ("a.tar", 10200, 100), ("a.tar", 60, 20), ("b.tar", 0, 5)]
    assert merged([("a", 0, 10), ("a", 10 + GAP, 5), ("a", 20 + 2 * GAP, 5)]) == [
        [("a", 0, 10), ("a", 10 + GAP, 5)],
        [("a", 20 + 2 * GAP, 5)],
    ]
    folder = RemoteFolder(store.url, QUICK)
    assert folder.read_many(wanted[:2] + wanted[3:4]) == [BYTES[9000:9100], BYTES[:50], BYTES[60:80]]
    assert len(store.asked) == 1
    found = folder.read_many(wanted)
    assert found[:2] + found[3:4] == [BYTES[9000:9100], BYTES[:50], BYTES[60:80]]
    assert isinstance(found[2], DataError) and isinstance(found[4], DataError)


@pytest.mark.parametrize(
    "values", [dict(retries=-1), dict(timeout=0), dict(backoff=-1), dict(requests=0), dict(ahead_mb=-1)]
)
def test_settings_that_cannot_work_are_refused(values):
    with pytest.raises(ConfigError, match=f"data.remote.{next(iter(values))}="):
        Remote(**values)


@pytest.mark.parametrize("kind", ["video", "latents"])
@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_a_failing_store_equal_those_from_disk(tmp_path, kind, workers):
    folder = (write_clips if kind == "video" else write_latents)(tmp_path, SHAPES)
    make = video if kind == "video" else cached
    local = list(make(str(folder)).loader(0, 6))
    with serving(tmp_path) as server:
        data = make(server.url, workers=workers, remote=Remote(retries=6, timeout=0.5, backoff=0.01))
        server.faults = [503, "reset"]
        data.items()  # reads the manifest
        server.faults = [503, "reset", "short", 500]
        far = list(data.loader(0, 6))
    assert all(same(a, b) for a, b in zip(local, far, strict=True)) and len(far) == 6


def test_a_manifest_that_may_not_be_read_is_one_clear_error(store):
    store.always = 403
    with pytest.raises(StoreError, match="check the credentials"):
        read_manifest(store.url)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_dead_store_stops_the_run_and_is_not_taken_for_damaged_samples(tmp_path, workers):
    folder = write_latents(tmp_path / "shards", SHAPES)
    with serving(folder) as server:
        data = cached(server.url, workers=workers, remote=QUICK, quarantine=str(tmp_path / "q"))
        data.items()
        server.always = 503
        with pytest.raises(StoreError, match="status 503, 4 times"):
            list(data.loader(0, 3))
    assert not (tmp_path / "q").exists()


def test_a_stale_manifest_of_remote_shards_puts_aside_what_it_is_wrong_about(tmp_path):
    folder = write_latents(tmp_path / "shards", SHAPES)
    table = [dict(vars(row), scores="{}") for row in read_manifest(folder).rows()]
    table[3]["media_offset"] += 1 << 20
    write_manifest(folder, table)
    with serving(folder) as server:
        data = cached(server.url, remote=QUICK, quarantine=str(tmp_path / "q"), batch_size=4)
        keys = {name for batch in data.loader(0, 8) for name in batch.keys}
    assert key(3) not in keys and "ends before byte" in (tmp_path / "q").read_text()
