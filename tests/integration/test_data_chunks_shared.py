"""Many processes share one cache of chunks."""

from __future__ import annotations

import multiprocessing
import os
import sys
from pathlib import Path

import pytest

from soratrain.data.chunks import CHUNK, ChunkCache
from soratrain.data.remote import Remote, RemoteFolder

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
pytestmark = pytest.mark.full
SIZE = 5 * CHUNK + 1000
BYTES = bytes(index * 7 % 251 for index in range(SIZE))


def read_all(url: str, folder: str, die: bool, done) -> None:
    store = RemoteFolder(url, Remote(backoff=0.01))

    def fetch(ranges):
        if die:
            os._exit(9)  # while it holds the locks
        return store.read_many(ranges)

    cache = ChunkCache(folder, 1 << 30, "data", {"a.tar": SIZE}, fetch)
    whole = cache.read_many([("a.tar", 0, SIZE)])[0]
    done.send(isinstance(whole, bytes) and whole == Path(folder, "..", "store", "a.tar").read_bytes())


def test_many_processes_fetch_each_byte_once_and_one_that_dies_holds_up_none(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "cache").mkdir()
    (tmp_path / "store" / "a.tar").write_bytes(BYTES)
    from range_server import serving

    context, pipes = multiprocessing.get_context("forkserver"), []
    with serving(tmp_path / "store") as server:
        for number in range(4):
            here, there = context.Pipe(duplex=False)
            context.Process(target=read_all, args=(server.url, str(tmp_path / "cache"), number == 0, there)).start()
            there.close()
            pipes.append(here)
        assert all(pipe.poll(30) and pipe.recv() for pipe in pipes[1:])
        assert server.sent == SIZE
