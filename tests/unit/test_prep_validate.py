"""Promises of task=validate: whatever is wrong with a folder is found, and said with its place."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from prep_clips import moving, write

from data_prep.__main__ import main
from data_prep.validate import check
from soratrain.data.manifest import write_captions, write_manifest
from soratrain.data.reading import read_manifest, read_table


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("validate")
    (folder / "videos").mkdir()
    for number in range(4):
        write(folder / "videos" / f"{number}.mp4", moving(12 + number, seed=number))
    assert main([f"input={folder / 'videos'}", f"output={folder / 'built'}", "workers=2"]) == 0
    return folder / "built"


@pytest.fixture
def folder(sound: Path, tmp_path: Path) -> Path:
    return shutil.copytree(sound, tmp_path / "built")


def shard(folder: Path) -> Path:
    return folder / "shard-000000.tar"


def rewrite(folder: Path, change: Callable[[list[tuple[str, bytes]]], list[tuple[str, bytes]]]) -> None:
    """Write the shard again with other members, as somebody's script would: dataset.json is not told."""
    with tarfile.open(shard(folder)) as tar:
        members = [(item.name, tar.extractfile(item).read()) for item in tar]  # type: ignore[union-attr]
    with tarfile.open(shard(folder), "w", format=tarfile.PAX_FORMAT) as tar:
        for name, data in change(members):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, BytesIO(data))


def patch(folder: Path, place: int, data: bytes) -> None:
    """Overwrite bytes of the shard."""
    with open(shard(folder), "r+b") as file:
        file.seek(place)
        file.write(data)


def row(folder: Path, number: int = 1):
    return read_manifest(folder).row(number)


def change_rows(folder: Path, **columns: object) -> None:
    rows = read_table(folder).to_pylist()
    rows[1] |= columns
    write_manifest(folder, rows)


def damage_media(folder: Path) -> None:
    patch(folder, row(folder).media_offset + row(folder).media_length // 2, b"\0\1\2\3" * 8)


def damage_json(folder: Path, text: bytes) -> None:
    patch(folder, row(folder).json_offset, text)


def rename_in_json(folder: Path, old: bytes, new: bytes) -> None:
    place = shard(folder).read_bytes().index(old, row(folder).json_offset)
    patch(folder, place, new)


def swap_captions(folder: Path) -> None:
    line = dict.fromkeys(("type", "text", "model", "rev", "lang"), "x")
    write_captions(folder / "captions/gt/part-00000.parquet", [line | {"key": "f" * 32}])


def edit_dataset(folder: Path, change: Callable[[dict], object]) -> None:
    value = json.loads((folder / "dataset.json").read_text())
    change(value)
    (folder / "dataset.json").write_text(json.dumps(value))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped bytes": (damage_media, "CRC-32"),
    "changed checksum": (lambda f: patch(f, 300, b"x"), "SHA-256"),
    "truncated body": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:-14000]), "cut off or damaged after"),
    "truncated header": (lambda f: shard(f).write_bytes(shard(f).read_bytes()[:100]), "is not a tar"),
    "gzip": (lambda f: shard(f).write_bytes(gzip.compress(shard(f).read_bytes())), "is gzip"),
    "empty tar": (lambda f: rewrite(f, lambda members: []), "the shard ends before its media does"),
    "missing shard": (lambda f: shard(f).unlink(), "is not there"),
    "a shard too many": (lambda f: shutil.copy(shard(f), f / "other.tar"), "dataset.json does not know"),
    "missing member": (lambda f: rewrite(f, lambda m: m[:2] + m[3:]), "stale manifest"),
    "other order": (lambda f: rewrite(f, lambda m: [m[1], m[0], *m[2:]]), "its JSON comes after its media"),
    "apart": (lambda f: rewrite(f, lambda m: [m[0], m[2], m[3], m[1], *m[4:]]), "not adjacent"),
    "twice in a shard": (lambda f: rewrite(f, lambda m: [*m, *m[:2]]), "occurs twice in this shard"),
    "not in the manifest": (lambda f: rewrite(f, lambda m: [*m, ("a" * 32 + ".mp4", b"1")]), "not in the manifest"),
    "invalid JSON": (lambda f: damage_json(f, b"[}"), "its K.json cannot be read"),
    "NaN": (lambda f: damage_json(f, b'{"schema":NaN'), "its K.json cannot be read"),
    "no sizes in JSON": (lambda f: rename_in_json(f, b'"video":', b'"vidio":'), "its JSON says w None"),
    "stale offsets": (lambda f: change_rows(f, media_offset=row(f).media_offset + 512), "a stale manifest"),
    "another size": (lambda f: change_rows(f, w=640), "decodes to w 64, not 640"),
    "another size in JSON": (lambda f: change_rows(f, h=640), "its JSON says h 48, not 640"),
    "more frames": (lambda f: change_rows(f, frames=99), "frames 13, not 99"),
    "a key twice": (lambda f: change_rows(f, key=row(f, 0).key), "occurs twice in the manifest"),
    "no manifest": (lambda f: shutil.rmtree(f / "manifest"), "has no manifest"),
    "fewer samples": (lambda f: write_manifest(f, read_table(f).to_pylist()[:2]), "holds 2 samples"),
    "another build's settings": (
        lambda f: edit_dataset(f, lambda d: d["settings"].update(license="x")),
        "config_hash is not that of its settings",
    ),
    "a caption of nobody": (swap_captions, "a caption of a sample that is not in the manifest"),
}


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check shards here: that processes do it alike is seen in `test_a_sound_folder…`."""

    class Inline:
        def __init__(self, *_: object, **__: object) -> None: ...

        def __enter__(self):
            return self

        def __exit__(self, *_: object) -> None: ...

        map = staticmethod(map)

    monkeypatch.setattr("data_prep.validate.ProcessPoolExecutor", Inline)


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_named(folder: Path, name: str) -> None:
    harm, said = DAMAGES[name]
    assert list(check(folder, "all", 1)) == []
    harm(folder)
    problems = list(check(folder, "all", 1))
    assert any(said in item.what for item in problems), problems
    assert all(item.file in ("manifest", "captions", "dataset.json") or item.file.endswith(".tar") for item in problems)


def test_a_problem_has_the_shard_the_sample_and_the_byte(folder: Path) -> None:
    damage_media(folder)
    found = [item for item in check(folder, "none", 1) if item.key]
    assert [(item.file, item.key, item.offset) for item in found] == [
        ("shard-000000.tar", row(folder).key, row(folder).media_offset)
    ]


def test_a_sound_folder_is_said_to_be_and_one_that_is_not_ends_with_code_2_and_a_full_list(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # in processes of their own
    before = sorted(folder.rglob("*"))
    assert main(["task=validate", f"input={folder}", "validate.decode=all"]) == 0
    assert "4 samples, nothing wrong" in capsys.readouterr().out
    assert sorted(folder.rglob("*")) == before
    damage_media(folder)
    assert main(["task=validate", f"input={folder}", f"validate.report={tmp_path / 'all.json'}"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: input=") and "2 problems" in said.err
    assert len(json.loads((tmp_path / "all.json").read_text())) == 2
    assert main(["task=validate", f"input={tmp_path}"]) == 2
    assert "no readable dataset.json" in capsys.readouterr().err


def test_a_selection_is_sound_though_its_shards_hold_more(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "selected"
    assert main(["task=select", f"input={folder}", f"output={out}", "select.min_seconds=1.25"]) == 0
    assert len(read_table(out)) < 4 and list(check(out, "all", 1)) == []
    assert pq.read_table(next((out / "manifest").glob("*.parquet"))).num_rows == len(read_table(out))


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task=validate", f"input={tmp_path / 'nope'}"]) == 2
    assert capsys.readouterr().err == f"error: input={tmp_path / 'nope'} does not exist\n"
