from __future__ import annotations

import functools
import http.server
import pickle
import subprocess
import sys
import threading

import numpy as np
import pytest

from soratrain.data.caption_table import open_captions
from soratrain.data.manifest import write_captions, write_manifest
from soratrain.data.reading import read_manifest
from soratrain.errors import DataError


def _row(index: int, **changes: object) -> dict:
    row = dict(
        key=f"{index:032x}", shard=f"shard-{index // 3:06d}.tar", kind="video", ext="mp4", w=64, h=48, frames=17,
        fps_num=24000, fps_den=1001, json_offset=512 + 4096 * index, json_length=100, media_offset=1536 + 4096 * index,
        media_length=2000, crc32=4_000_000_000 + index, scores="{}",
    )  # fmt: skip
    return row | changes


def test_rows_come_back_as_written_whatever_their_parts(tmp_path):
    rows = [_row(index, kind="image" if index % 2 else "video") for index in range(7)]
    write_manifest(tmp_path / "one", rows)
    write_manifest(tmp_path / "two", rows[4:], part=0)
    write_manifest(tmp_path / "two", rows[:4], part=1)
    one, two = read_manifest(tmp_path / "one"), read_manifest(str(tmp_path / "two"))
    assert [vars(row) | {"scores": "{}"} for row in one.rows()] == rows
    assert [*one.rows()] == [*two.rows()] and one.hash == two.hash
    assert one.image.tolist() == [False, True] * 3 + [False]
    assert one.key.dtype == np.dtype("S32") and one.row(0).fps == 24000 / 1001


def test_the_hash_tells_another_content_from_another_place(tmp_path):
    write_manifest(tmp_path / "a", [_row(0), _row(1)])
    write_manifest(tmp_path / "b", [_row(0), _row(1, crc32=1)])
    write_manifest(tmp_path / "c", [_row(0), _row(1)])
    a, b, c = (read_manifest(tmp_path / name).hash for name in "abc")
    assert a == c != b


@pytest.mark.parametrize(
    "row, message",
    [
        ({**_row(0), "extra": 1}, "extra"),
        ({name: value for name, value in _row(0).items() if name != "crc32"}, "crc32"),
        (_row(0, w="wide"), "does not fit"),
        (_row(0, w=None), "column w is missing"),
        (_row(0, kind="audio"), "kind='audio'"),
    ],
)
def test_a_row_that_does_not_fit_the_columns_is_refused_and_nothing_is_left(tmp_path, row, message):
    with pytest.raises(DataError, match=message):
        write_manifest(tmp_path, [row])
    assert not list(tmp_path.rglob("*.parquet*"))


def test_a_key_that_occurs_twice_is_refused(tmp_path):
    write_manifest(tmp_path, [_row(0), _row(1)])
    write_manifest(tmp_path, [_row(1)], part=1)
    with pytest.raises(DataError, match="occurs twice"):
        read_manifest(tmp_path)


def test_a_folder_without_a_manifest_names_the_command_that_makes_one(tmp_path):
    with pytest.raises(DataError, match="python -m data_prep"):
        read_manifest(tmp_path)


def test_captions_are_found_by_key_from_every_level_of_their_folder(tmp_path):
    rows = [
        dict(key=f"{index:032x}", type=kind, text=f"{kind} {index}", model="m", rev="r", lang="en")
        for index in range(3)
        for kind in ("short", "long")
    ]
    write_captions(tmp_path / "captions" / "r" / "part-00001.parquet", rows[3:])
    write_captions(tmp_path / "captions" / "r" / "part-00000.parquet", rows[:3])
    for folder in (tmp_path, tmp_path / "captions", tmp_path / "captions" / "r"):
        found = open_captions(folder)
        assert [caption["text"] for caption in found.get(f"{1:032x}")] == ["long 1", "short 1"]
        assert len(found) == 6 and found.get(f"{9:032x}") == []
        assert pickle.loads(pickle.dumps(found)).get(f"{2:032x}") == found.get(f"{2:032x}") != []
        assert len(pickle.dumps(found)) < 300, "pickled as the place where it lies"
    with pytest.raises(DataError, match="stage=recaption"):
        open_captions(tmp_path / "nothing")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def test_a_manifest_is_read_over_http(tmp_path):
    write_manifest(tmp_path, [_row(0), _row(1)])
    handler = functools.partial(_Quiet, directory=str(tmp_path))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        found = read_manifest(f"http://127.0.0.1:{server.server_port}")
        assert [*found.rows()] == [*read_manifest(tmp_path).rows()]
        server.shutdown()


def test_reading_a_manifest_loads_neither_torch_nor_lightning():
    code = "import sys, soratrain.data.manifest, soratrain.data.shards; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
