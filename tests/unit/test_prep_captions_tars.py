"""Captions in a table find samples of tars by their keys."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

from caption_tables import Rows, table_of, texts


def test_samples_of_tars_are_known_by_their_keys(tmp_path: Path) -> None:
    (tmp_path / "tars").mkdir()
    for shard, keys in (("00000", ("k0", "k1")), ("00001", ("k2", "k0"))):
        with tarfile.open(tmp_path / f"tars/{shard}.tar", "w") as tar:
            for name in (f"{key}.{ending}" for key in keys for ending in ("mp4", "txt")):
                info = tarfile.TarInfo(name)
                info.size = 6
                tar.addfile(info, io.BytesIO(b"inside"))
    rows: Rows = [
        {"key": "k0", "caption": "not sure"},
        {"key": "k1", "caption": "one"},
        {"key": "00001.tar/k0.mp4", "caption": "zero"},
        {"key": "k2", "caption": "two"},
    ]
    assert texts(tmp_path / "tars", table_of(tmp_path / "t.parquet", rows)) == {
        "00000.tar/k0.mp4": ["inside"],
        "00000.tar/k1.mp4": ["one"],
        "00001.tar/k0.mp4": ["zero"],
        "00001.tar/k2.mp4": ["two"],
    }
