"""The cache of a node: each chunk is fetched once, whatever is killed, damaged or full."""

from __future__ import annotations

from pathlib import Path

import data_tiny
import pytest
from data_tiny import write_latents
from range_server import serving
from test_data_loader import SHAPES, cached, same

from soratrain.data import chunks
from soratrain.data.chunks import CHUNK, ChunkCache
from soratrain.data.remote import Remote
from soratrain.errors import DataError

SIZE = 5 * CHUNK + 1000
BYTES = bytes(index * 7 % 251 for index in range(SIZE))


def cache(folder: Path, asked: list, limit: int = 1 << 30, size: int = SIZE) -> ChunkCache:
    def fetch(ranges):
        asked.extend(ranges)
        return [BYTES[o : o + n] if o + n <= size else DataError("ends before") for _, o, n in ranges]

    return ChunkCache(folder, limit, "data", {"a.tar": SIZE}, fetch)


def chunk_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*/0*"))


def test_ranges_are_right_across_chunks_and_each_chunk_is_fetched_once(tmp_path):
    asked: list = []
    wanted = [("a.tar", o, n) for o, n in ((0, 10), (CHUNK - 5, 10), (3, 3 * CHUNK), (SIZE - 7, 7), (CHUNK, CHUNK))]
    for _ in range(2):
        assert cache(tmp_path, asked).read_many(wanted) == [BYTES[o : o + n] for _, o, n in wanted]
    assert sorted(asked) == [("a.tar", n * CHUNK, CHUNK) for n in range(4)] + [("a.tar", 5 * CHUNK, 1000)]


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-9], lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: b""]
)
def test_a_damaged_chunk_is_fetched_again(tmp_path, harm):
    asked: list = []
    wanted = [("a.tar", 100, 50)]
    cache(tmp_path, asked).read_many(wanted)
    (file,) = chunk_files(tmp_path)
    file.write_bytes(harm(file.read_bytes()))
    assert cache(tmp_path, asked).read_many(wanted) == [BYTES[100:150]] and len(asked) == 2
    assert cache(tmp_path, asked).read_many(wanted) == [BYTES[100:150]] and len(asked) == 2


def test_what_was_used_longest_ago_goes_when_the_limit_is_passed(tmp_path):
    asked: list = []
    kept = cache(tmp_path, asked, limit=4 * CHUNK)
    for number in (0, 1, 2, 0, 3):  # the fourth passes the limit; 1 and 2 are the older
        kept.read_many([("a.tar", number * CHUNK, 10)])
    assert [file.name for file in chunk_files(tmp_path)] in (["000000", "000002", "000003"], ["000000", "000003"])
    assert sum(file.stat().st_size for file in chunk_files(tmp_path)) <= 4 * CHUNK


def test_a_shard_that_ends_too_early_gives_what_it_holds(tmp_path):
    found = cache(tmp_path, [], size=SIZE - 500).read_many([("a.tar", SIZE - 900, 100), ("a.tar", SIZE - 100, 50)])
    assert found[0] == BYTES[SIZE - 900 : SIZE - 800] and isinstance(found[1], DataError)


def test_a_full_disk_costs_the_cache_and_not_the_data(tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(chunks.os, "replace", full)
    assert cache(tmp_path, []).read_many([("a.tar", 5, 9)]) == [BYTES[5:14]]
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "lock" not in path.name]


def test_batches_through_the_cache_equal_those_from_disk_and_the_next_epoch_reads_nothing(tmp_path):
    folder = write_latents(tmp_path / "shards", SHAPES)
    local = list(cached(str(folder)).loader(0, 12))
    with serving(folder) as server:
        for workers in (0, 2):
            data = cached(server.url, workers=workers, remote=Remote(cache_dir=str(tmp_path / "cache")))
            far = list(data.loader(0, 12))
            assert len(far) == 12 and all(same(a, b) for a, b in zip(local, far, strict=True))
            tars = [path for path, _ in server.asked if path.endswith(".tar")]
        assert len(tars) == 1


def test_shards_written_again_with_other_headers_are_not_taken_from_the_cache(tmp_path, monkeypatch):
    """The media are the same, but lie elsewhere: old chunks would hold none of them where the manifest says."""
    folder, remote = tmp_path / "shards", Remote(cache_dir=str(tmp_path / "cache"))
    write_latents(folder, SHAPES)
    with serving(folder) as server:
        first = list(cached(server.url, remote=remote).loader(0, 4))
        longer = [{"type": "long", "text": "another caption " * 200, "model": "", "rev": "", "lang": "en"}]
        monkeypatch.setattr(data_tiny, "captions", lambda number: longer)
        write_latents(folder, SHAPES)
        again = list(cached(server.url, remote=remote, max_bad=0).loader(0, 4))
    assert [batch.keys for batch in again] == [batch.keys for batch in first]
    assert {text for batch in again for text in batch.captions} == {"another caption " * 200}
