"""Promises about indexing tars that are there already."""

from __future__ import annotations

import io
import json
import tarfile
from fractions import Fraction
from pathlib import Path

import pytest
from prep_clips import moving, picture, set_turn, write

from data_prep.__main__ import main
from data_prep.encode import encode_png
from data_prep.index import work
from soratrain.data.caption_table import open_captions
from soratrain.data.decode import decode
from soratrain.data.reading import read_manifest


def put(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """A WebDataset as another program would write it: short names, captions in .txt or .json, a still, a bad clip."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    clip = write(tmp_path / "a.mp4", moving(5), rate=8).read_bytes()
    turned = write(tmp_path / "b.mp4", moving(4), rate=8)
    set_turn(turned, (0, 1, -1, 0))
    with tarfile.open(folder / "00000.tar", "w") as tar:
        put(tar, "000000.mp4", clip)
        put(tar, "000000.txt", b"a  cat\n")
        put(tar, "000001.json", json.dumps({"caption": "a dog", "duration": 3}).encode())
        put(tar, "000001.mp4", clip)
        put(tar, "000002.mp4", b"broken")
        put(tar, "000003.txt", b"no media")
        put(tar, "000004.mp4", turned.read_bytes())
    with tarfile.open(folder / "00001.tar", "w") as tar:
        put(tar, "./000000.png", encode_png(picture()))
        put(tar, "./000000.json", b"{}")
    return folder


def test_a_foreign_webdataset_gets_a_manifest_and_stays_as_it_is(foreign: Path) -> None:
    before = {path.name: path.read_bytes() for path in foreign.glob("*.tar")}
    assert main(["task=index", f"input={foreign}"]) == 0
    assert {path.name: path.read_bytes() for path in foreign.glob("*.tar")} == before
    rows = list(read_manifest(foreign).rows())
    assert [(row.shard, row.kind, row.frames, row.fps) for row in rows] == [
        ("00000.tar", "video", 5, 8),
        ("00000.tar", "video", 5, 8),
        ("00001.tar", "image", 1, 1),
    ]
    for row in rows:
        assert before[row.shard][row.media_offset :][4:8] in (b"ftyp", b"\r\n\x1a\n")
    captions = open_captions(foreign / "captions")
    assert [[item["text"] for item in captions.get(row.key)] for row in rows] == [["a cat"], ["a dog"], []]
    failures = [json.loads(line) for line in (foreign / "failures.jsonl").read_text().splitlines()]
    assert [item["uri"].split("/")[-1] for item in failures] == ["000002", "000003", "000004"]
    assert json.loads((foreign / "stats.json").read_text())["funnel"][1]["out"] == 3


def test_a_folder_that_was_built_needs_no_index_unless_its_tars_are_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    built = tmp_path / "built"
    assert main(["input=world", f"output={built}", "world.clips=1"]) == 0
    before = (built / "dataset.json").read_bytes()
    capsys.readouterr()
    assert main(["task=index", f"input={built}"]) == 0
    assert capsys.readouterr().out.split() == f"{built} is finished already, by task=build, and needs no index".split()
    with tarfile.open(built / "more.tar", "w") as tar:
        put(tar, "0.png", encode_png(picture()))
    assert main(["task=index", f"input={built}"]) == 2
    assert "more.tar is not what dataset.json tells of" in capsys.readouterr().err
    assert (built / "dataset.json").read_bytes() == before
    assert main(["task=index", f"input={built}", "fresh=true"]) == 0
    assert len(list(read_manifest(built).rows())) == 2


def test_a_clip_of_varying_rate_is_as_long_as_it_is_shown_and_loads_to_its_last_frame(tmp_path: Path) -> None:
    ticks = [0, 1, 2, 3, 4, 9, 14, 19, 20]  # of a 10th of a second: frames 5 to 18 are those before them
    write(tmp_path / "a.mkv", moving(9), ticks=ticks, time_base=Fraction(1, 10))
    (tmp_path / "tars").mkdir()
    with tarfile.open(tmp_path / "tars/0.tar", "w") as tar:
        put(tar, "0.mkv", (tmp_path / "a.mkv").read_bytes())
        put(tar, "0.json", b"{}")  # after its media, as it may be where another made it
    assert main(["task=index", f"input={tmp_path / 'tars'}"]) == 0
    (row,) = read_manifest(tmp_path / "tars").rows()
    assert abs(row.frames / row.fps - 2.1) < 1.01 / row.fps
    decode((tmp_path / "a.mkv").read_bytes(), fps=row.fps, count=row.frames)  # all are there
    assert main(["task=validate", f"input={tmp_path / 'tars'}", "validate.decode=all"]) == 0


def test_indexing_again_says_so_and_notices_a_new_tar(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["task=index", f"input={foreign}"])
    assert main(["task=index", f"input={foreign}"]) == 0 and "is indexed" in capsys.readouterr().out
    (foreign / "00002.tar").write_bytes((foreign / "00001.tar").read_bytes())
    assert main(["task=index", f"input={foreign}"]) == 2 and "changed since" in capsys.readouterr().err
    assert main(["task=index", f"input={foreign}", "fresh=true"]) == 0
    assert len(read_manifest(foreign)) == 4 and (foreign / "00000.tar").exists()


def test_a_build_never_replaces_shards_of_another(foreign: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["task=index", f"input={foreign}"])
    assert main(["input=world", f"output={foreign}", "world.clips=1", "fresh=true"]) == 2
    assert "did not make" in capsys.readouterr().err and (foreign / "00000.tar").exists()


def test_a_tar_that_is_cut_off_gives_what_is_before(foreign: Path) -> None:
    data = (foreign / "00000.tar").read_bytes()
    with tarfile.open(foreign / "00000.tar") as tar:
        second = tar.getmember("000001.mp4")
    (foreign / "00000.tar").write_bytes(data[: second.offset_data + 100])
    (foreign / "00003.tar").write_bytes(b"this is no tar" * 100)
    assert main(["task=index", f"input={foreign}"]) == 0
    assert [row.shard for row in read_manifest(foreign).rows()] == ["00000.tar", "00001.tar"]
    reasons = [json.loads(line)["reason"] for line in (foreign / "failures.jsonl").read_text().splitlines()]
    assert any("cut off" in reason for reason in reasons) and any("is not a tar" in reason for reason in reasons)


def test_an_index_of_our_own_shards_equals_the_one_they_came_with(tmp_path: Path) -> None:
    write(tmp_path / "videos.mp4", moving(12)).rename(tmp_path / "clip.mp4")
    assert main([f"input={tmp_path / 'clip.mp4'}", f"output={tmp_path / 'out'}"]) == 0
    made = read_manifest(tmp_path / "out")
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "shard-000000.tar").write_bytes((tmp_path / "out/shard-000000.tar").read_bytes())
    assert main(["task=index", f"input={copy}"]) == 0
    assert list(read_manifest(copy).rows()) == list(made.rows()) and read_manifest(copy).hash == made.hash
    assert not (copy / "captions").exists()


@pytest.mark.parametrize("where", ["nothing", "empty", "broken"])
def test_a_folder_without_usable_tars_is_one_line_and_left_as_it_is(
    tmp_path: Path, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/a.tar").write_bytes(b"")
    assert main(["task=index", f"input={tmp_path / where}"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: input={tmp_path / where}") and error.count("\n") == 1
    assert [path.name for path in tmp_path.glob("*/*")] == ["a.tar"]


def test_a_folder_with_the_name_of_a_tar_is_no_tar(foreign: Path) -> None:
    (foreign / "folder.tar").mkdir()
    assert main(["task=index", f"input={foreign}"]) == 0


def test_a_failure_of_the_disk_is_one_line_and_the_same_command_goes_on(
    foreign: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device", "manifest")

    with monkeypatch.context() as patch:
        patch.setattr("data_prep.result.write_manifest", full)
        assert main(["task=index", f"input={foreign}"]) == 2
    error = capsys.readouterr().err
    assert "No space left" in error and "manifest" in error and error.count("\n") == 1
    assert main(["task=index", f"input={foreign}"]) == 0
    assert "continuing, 2 of 2 tars read" in capsys.readouterr().out
    assert len(read_manifest(foreign)) == 3 and not (foreign / ".building").exists()


def test_an_index_waits_for_no_other_and_does_not_disturb_it(
    foreign: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    inner: list[int] = []

    def twice(*values: object, **more: object) -> object:
        if not inner:
            inner.append(0)
            inner.append(main(["task=index", f"input={foreign}"]))
        return work(*values, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("data_prep.index.work", twice)
    assert main(["task=index", f"input={foreign}"]) == 0
    assert inner == [0, 2] and "another data_prep is at work" in capsys.readouterr().err
    assert len(read_manifest(foreign)) == 3
