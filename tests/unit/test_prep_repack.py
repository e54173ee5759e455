"""Promises of task=repack: the same samples in other shards, byte for byte, and an interruption that costs nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from prep_clips import moving, write

from data_prep import repack as module
from data_prep.__main__ import main
from data_prep.encode import encode_png
from soratrain.data.caption_table import read_original_captions
from soratrain.data.captions import captions_of
from soratrain.data.manifest import Row, write_manifest
from soratrain.data.members import read_members
from soratrain.data.reading import read_manifest, read_table
from soratrain.data.shards import ShardReader, ShardWriter

IMAGES, VIDEOS = 14, 2


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished folder of one shard, 2.8 MB: images of noise, which do not compress, and two videos."""
    folder = tmp_path_factory.mktemp("repack")
    noise = np.random.default_rng(0)
    for number in range(IMAGES):
        pixels = noise.integers(0, 256, (256, 256, 3), dtype=np.uint8)
        (folder / "in").mkdir(exist_ok=True)
        (folder / "in" / f"{number:02d} noise.png").write_bytes(encode_png(pixels))
        (folder / "in" / f"{number:02d} noise.txt").write_text(f"noise number {number}")
    for number in range(VIDEOS):
        write(folder / "in" / f"video {number}.mp4", moving(10, seed=number))
    assert main([f"input={folder / 'in'}", f"output={folder / 'built'}"]) == 0
    return folder / "built"


def repack(source: Path, out: Path, *argv: str, code: int = 0) -> None:
    assert main(["task=repack", f"input={source}", f"output={out}", "shards.mb=1", *argv]) == code


def samples(folder: Path) -> Iterator[tuple[Row, bytes, bytes]]:
    """Yield each row of a folder, in the order of its shards, with the bytes of its K.json and its media."""
    reader = ShardReader(folder)
    for row in read_manifest(folder).rows():
        text = reader.read(row.shard, row.json_offset, row.json_length)
        yield row, text, reader.read(row.shard, row.media_offset, row.media_length)


def contents(folder: Path) -> dict[str, tuple[bytes, bytes]]:
    return {row.key: (text, media) for row, text, media in samples(folder)}


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def validated(folder: Path) -> bool:
    return main(["task=validate", f"input={folder}", "validate.decode=all"]) == 0


def test_samples_go_over_byte_for_byte_into_shards_of_the_size_that_was_asked_for(built: Path, tmp_path: Path) -> None:
    repack(built, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(built)
    shards = sorted((tmp_path / "out").glob("*.tar"))
    assert len(shards) == 3 and all(path.stat().st_size <= (1 << 20) + 10240 for path in shards)
    placed = ("shard", "json_offset", "media_offset")
    before, after = (
        [{name: row[name] for name in row if name not in placed} for row in read_table(folder).to_pylist()]
        for folder in (built, tmp_path / "out")
    )
    assert after == before  # in the same order, too
    assert validated(tmp_path / "out")
    told = json.loads((tmp_path / "out/dataset.json").read_text())
    was = json.loads((built / "dataset.json").read_text())
    assert told["totals"] == was["totals"] and told["histograms"] == was["histograms"]
    assert [shard["samples"] for shard in told["shards"]] == [5, 5, 6]
    (row,) = json.loads((tmp_path / "out/stats.json").read_text())["funnel"]
    assert (row["step"], row["in"], row["out"], row["dropped"]) == ("repack", 16, 16, {})
    assert (tmp_path / "out/report.html").is_file()


def test_a_seed_gives_an_order_of_its_own_always_the_same(built: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        repack(built, tmp_path / name, f"repack.shuffle={seed}", f"workers={2 if name == 'a' else 1}")
    assert files(tmp_path / "a") == files(tmp_path / "b")
    orders = [[row.key for row, _, _ in samples(folder)] for folder in (built, tmp_path / "a", tmp_path / "c")]
    assert len({tuple(order) for order in orders}) == 3 and len({tuple(sorted(order)) for order in orders}) == 1


def test_what_was_selected_stands_on_its_own(built: Path, tmp_path: Path) -> None:
    assert main(["task=select", f"input={built}", f"output={tmp_path / 'chosen'}", "select.max_static=null"]) == 0
    chosen = contents(tmp_path / "chosen")
    lost = next(iter(chosen))
    rows = [row for row in read_table(tmp_path / "chosen").to_pylist() if row["key"] != lost]
    write_manifest(tmp_path / "chosen", rows)
    repack(tmp_path / "chosen", tmp_path / "out")
    shutil.rmtree(tmp_path / "chosen")
    assert contents(tmp_path / "out") == {key: chosen[key] for key in chosen if key != lost}
    assert all(path.stat().st_nlink == 1 and not path.is_symlink() for path in (tmp_path / "out").glob("*.tar"))
    assert validated(tmp_path / "out")  # which also finds samples that no manifest knows


def test_samples_of_another_get_a_k_json_with_their_captions(tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    video = write(tmp_path / "clip.mp4", moving(10)).read_bytes()
    with tarfile.open(theirs / "00000.tar", "w") as tar:
        told = json.dumps({"caption": "a red corner", "url": "http://x/1"}).encode()
        for name, data in (("0001.mp4", video), ("0001.json", told), ("0002.mp4", video), ("0002.txt", b"two words")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert main(["task=index", f"input={theirs}"]) == 0
    repack(theirs, tmp_path / "out")
    found = {}
    reader = ShardReader(tmp_path / "out")
    for row in read_manifest(tmp_path / "out").rows():
        record, media = read_members(reader, row)
        assert media == video and record["key"] == row.key
        found[record["source"]["uri"]] = record
    assert sorted(found) == ["00000.tar/0001.mp4", "00000.tar/0002.mp4"]
    first = found["00000.tar/0001.mp4"]
    assert [caption["text"] for caption in captions_of(first)] == ["a red corner"]
    assert [caption["text"] for caption in captions_of(found["00000.tar/0002.mp4"])] == ["two words"]
    assert first["foreign"]["url"] == "http://x/1" and first["video"] == {
        "w": 64,
        "h": 48,
        "fps": [10, 1],
        "frames": 10,
    }
    assert first["source"]["end_us"] == 1_000_000
    assert list(read_original_captions(tmp_path / "out")) == []
    assert validated(tmp_path / "out")
    repack(tmp_path / "out", tmp_path / "again")  # ours now: nothing is made anew
    assert contents(tmp_path / "again") == contents(tmp_path / "out")


def test_an_interrupted_repack_goes_on_and_ends_the_same(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    repack(built, tmp_path / "whole", "workers=1")
    write_sample, written, limit = ShardWriter.write, [], [7]

    def full(self: ShardWriter, key: str, members: dict[str, bytes]) -> object:
        written.append(self.number)
        if len(written) > limit[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_sample(self, key, members)

    monkeypatch.setattr(ShardWriter, "write", full)
    repack(built, tmp_path / "out", "workers=1", code=2)
    assert "No space left on device; the same command continues" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out/dataset.json").exists()
    assert [path.name for path in (tmp_path / "out/.building/shards").iterdir()] == ["shard-000000.tar"]
    limit[0] = 1000
    repack(built, tmp_path / "out", "workers=1")
    assert "1 of 3 shards were done" in capsys.readouterr().out and written.count(0) == 5
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_a_damaged_sample_is_dropped_with_its_reason(built: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(built, damaged)
    rows = list(read_manifest(damaged).rows())
    with open(damaged / rows[3].shard, "r+b") as file:
        file.seek(rows[3].media_offset + 100)
        file.write(b"\0damage\0")
    repack(damaged, tmp_path / "out")
    assert set(contents(tmp_path / "out")) == {row.key for row in rows} - {rows[3].key}
    (line,) = (tmp_path / "out/failures.jsonl").read_text().splitlines()
    failure = json.loads(line)
    assert failure["uri"] == f"{rows[3].shard}/{rows[3].key}" and failure["step"] == "repack"
    assert "CRC-32" in failure["reason"]
    assert validated(tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["output={built}"], "is the input; repack into another folder"),
        (["output={built}", "fresh=true"], "is the input; repack into another folder"),
        (["input={out}/none"], "is no folder that data_prep has finished"),
        (["repack.shuffle=yes"], "repack.shuffle"),
        (["shards.mb=2"], "was made with shards.mb=1 (now 2)"),
    ],
)
def test_what_cannot_work_is_said(
    built: Path, tmp_path: Path, argv: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = files(built)
    repack(built, tmp_path / "out")
    capsys.readouterr()
    words = [word.format(built=built, out=tmp_path) for word in argv]
    repack(built, tmp_path / "out", *words, code=2)
    assert said in " ".join(capsys.readouterr().err.split())
    assert files(built) == before


def test_a_folder_in_which_nothing_is_whole_gives_no_folder(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(built, damaged)
    for path in damaged.glob("*.tar"):
        path.write_bytes(b"")
    repack(damaged, tmp_path / "out", code=2)
    assert "none of 16 samples is whole" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out").exists()


def test_each_shard_takes_as_many_samples_as_fit_and_at_least_one() -> None:
    rows = [{"json_length": 1, "media_length": size} for size in (10, 600, 5000, 1, 1)]
    sizes = [[row["media_length"] for row in part] for part in module.divided(rows, 4096 + 512)]
    assert sizes == [[10, 600], [5000], [1, 1]]
