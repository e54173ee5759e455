"""The cache of a node: each chunk is fetched once, whatever is killed, damaged or full."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import data_tiny
import pytest
from data_tiny import write_latents
from range_server import serving
from test_data_loader import SHAPES, cached, same

from soratrain.data import chunks
from soratrain.data.chunks import CHUNK, ChunkCache
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError, DataError

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


@pytest.mark.parametrize("what", ["mkdir", "write"])
def test_a_disk_that_is_full_elsewhere_costs_no_data_either(tmp_path, monkeypatch, what):
    kept = cache(tmp_path, [])

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((Path, "mkdir", full) if what == "mkdir" else (ChunkCache, "_count", full)))
    assert kept.read_many([("a.tar", 5, 9)]) == [BYTES[5:14]]


def test_a_folder_that_may_not_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"data.remote.cache_dir=.* cannot be used: Not a directory"):
        cache(tmp_path / "file", [])
    kept = cache(tmp_path / "cache", [])
    for stripe in range(chunks.STRIPES):
        (kept.folder / f"lock-{stripe:02d}").mkdir()  # stands for another user's
    with pytest.raises(ConfigError, match=r"data.remote.cache_dir=.* cannot be used: Is a directory"):
        kept.read_many([("a.tar", 5, 9)])


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
    folder, remote, seen = tmp_path / "shards", Remote(cache_dir=str(tmp_path / "cache")), []
    monkeypatch.setattr(data_tiny, "write", partial(data_tiny.write, max_bytes=1 << 24))
    with serving(folder) as server:
        for words in (20_000, 20_100):  # one shard of some chunks
            caption = {"type": "long", "text": "a caption " * words, "model": "", "rev": "", "lang": "en"}
            monkeypatch.setattr(data_tiny, "captions", lambda number, caption=caption: [caption])
            write_latents(folder, SHAPES)
            seen.append(list(cached(server.url, remote=remote, max_bad=0).loader(0, 8)))
            assert {text for batch in seen[-1] for text in batch.captions} == {caption["text"]}
    assert [batch.keys for batch in seen[0]] == [batch.keys for batch in seen[1]]
