from __future__ import annotations

import functools
import hashlib
import http.server
import json
import pickle
import threading
from pathlib import Path

import fsspec
import pytest
import webdataset

from soratrain.data.shards import ShardReader, ShardWriter
from soratrain.errors import DataError

KEYS = [f"{index:032x}" for index in range(5)]


def _write(folder: Path, max_bytes: int = 1 << 20) -> list[tuple[str, bytes, object]]:
    samples = []
    with ShardWriter(folder, max_bytes) as writer:
        for index, key in enumerate(KEYS):
            media = bytes([index]) * (700 * index + 1)
            header = json.dumps({"key": key}).encode()
            samples.append((key, media, writer.write(key, {"json": header, "mp4": media})))
    return samples


def test_members_read_back_by_offset(tmp_path):
    samples = _write(tmp_path, max_bytes=6000)
    assert len(list(tmp_path.glob("*.tar"))) > 1
    reader = pickle.loads(pickle.dumps(ShardReader(tmp_path)))
    for key, media, placed in samples:
        assert reader.read(placed.shard, *placed.members["mp4"]) == media
        assert json.loads(reader.read(placed.shard, *placed.members["json"])) == {"key": key}


def test_webdataset_reads_the_shards_and_the_json_comes_first(tmp_path):
    samples = _write(tmp_path)
    read = list(webdataset.WebDataset(str(tmp_path / "shard-000000.tar"), shardshuffle=False))
    assert [sample["__key__"] for sample in read] == KEYS
    assert [sample["mp4"] for sample in read] == [media for _, media, _ in samples]
    assert all(placed.members["json"][0] < placed.members["mp4"][0] for _, _, placed in samples)


def test_the_same_samples_give_the_same_bytes(tmp_path):
    with ShardWriter(tmp_path / "a") as writer:
        writer.write(KEYS[0], {"json": b"{}", "mp4": b"x"})
    _write(tmp_path / "b")
    _write(tmp_path / "c")
    names = ["shard-000000.tar"]
    assert [(tmp_path / "b" / name).read_bytes() for name in names] == [
        (tmp_path / "c" / name).read_bytes() for name in names
    ]
    assert writer.finished[0].sha256 == hashlib.sha256((tmp_path / "a" / names[0]).read_bytes()).hexdigest()


def test_an_error_leaves_no_half_written_shard(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 2000) as writer:
        writer.write(KEYS[0], {"json": b"{}", "mp4": bytes(900)})
        writer.write(KEYS[1], {"json": b"{}", "mp4": bytes(900)})
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["shard-000000.tar"]


def test_a_key_that_is_not_hex_is_refused(tmp_path):
    with ShardWriter(tmp_path) as writer, pytest.raises(DataError, match="32 hex digits"):
        writer.write("clip.1", {"mp4": b""})


def test_a_range_beyond_the_end_and_a_missing_shard_are_refused(tmp_path):
    samples = _write(tmp_path)
    with pytest.raises(DataError, match="ends before"):
        ShardReader(tmp_path).read(samples[0][2].shard, 1 << 20, 10)
    with pytest.raises(DataError, match="cannot be read"):
        ShardReader(tmp_path).read("other.tar", 0, 1)


def test_members_are_read_from_an_object_store(tmp_path):
    samples = _write(tmp_path)
    store = fsspec.filesystem("memory")
    for path in tmp_path.rglob("*"):
        if path.is_file():
            store.pipe(f"/bucket/data/{path.relative_to(tmp_path)}", path.read_bytes())
    reader = ShardReader("memory://bucket/data")
    assert [reader.read(placed.shard, *placed.members["mp4"]) for _, _, placed in samples] == [
        media for _, media, _ in samples
    ]
    with pytest.raises(DataError, match="ends before"):
        reader.read("shard-000000.tar", 1 << 20, 10)
    with pytest.raises(DataError, match="cannot be read"):
        reader.read("other.tar", 0, 1)


class _RangeHandler(http.server.SimpleHTTPRequestHandler):
    """The standard handler, with single byte ranges."""

    def do_GET(self) -> None:
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        data = Path(self.translate_path(self.path)).read_bytes()[int(first) : int(last) + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None: ...


def test_members_are_read_by_range_over_http(tmp_path):
    samples = _write(tmp_path)
    handler = functools.partial(_RangeHandler, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        reader = ShardReader(f"http://127.0.0.1:{server.server_port}")
        assert [reader.read(placed.shard, *placed.members["mp4"]) for _, _, placed in samples] == [
            media for _, media, _ in samples
        ]
        server.shutdown()
