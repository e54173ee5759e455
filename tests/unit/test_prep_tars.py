"""Promises about building from another's WebDataset tars: the whole chain, each sample a file of its own."""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prep_clips import moving, picture, set_turn, write, write_sound

from data_prep.__main__ import main
from data_prep.encode import encode_png
from data_prep.ingest import find
from data_prep.members import Member, Window
from data_prep.pack import Report
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader

FORMATS = [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]


def tar_of(path: Path, members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    """Write a tar; as WebDataset's writer does, with a time of a fraction of a second, which PAX needs a header for."""
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1_700_000_000.25 if format == tarfile.PAX_FORMAT else 1_700_000_000
            tar.addfile(info, io.BytesIO(data))
    return path


def offset_of(path: Path, name: str) -> tarfile.TarInfo:
    with tarfile.open(path) as tar:
        return tar.getmember(name)


def as_video2dataset(folder: Path, shard: str, clips: dict[str, tuple[bytes, str | None]]) -> dict[str, bytes]:
    """Write a shard as video2dataset does, with its parquet and its statistics beside it; return what is in it."""
    members: dict[str, bytes] = {}
    table: list[dict[str, Any]] = []
    for key, (media, caption) in clips.items():
        row = {"videoid": f"v{key}", "url": f"https://host/{key}.mp4", "caption": caption, "key": key}
        row |= {"status": "success", "error_message": None, "clips": [[0.0, 1.2]], "yt_meta_dict": None}
        members[f"{key}.mp4"] = media
        if caption is not None:
            members[f"{key}.txt"] = caption.encode()
        members[f"{key}.json"] = json.dumps(row, indent=4).encode()
        table.append(row)
    tar_of(folder / f"{shard}.tar", members)
    pq.write_table(pa.Table.from_pylist(table), folder / f"{shard}.parquet")
    stats = {"count": len(clips), "successes": len(clips), "failed_to_download": 0, "status_dict": {"success": 2}}
    (folder / f"{shard}_stats.json").write_text(json.dumps(stats))
    return members


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Clips that are copied, have sound, are stored turned, and one in two shots."""
    folder = tmp_path_factory.mktemp("media")
    write(folder / "plain.mp4", moving(12))
    write(folder / "sound.mp4", moving(9, seed=1), audio=True)
    set_turn(write(folder / "turned.mp4", moving(8, seed=2)), (0, 1, -1, 0))
    write(folder / "two.mp4", [*moving(12, seed=1), *[255 - frame for frame in moving(12, seed=5)]])
    return {path.stem: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def foreign(tmp_path: Path, media: dict[str, bytes]) -> Path:
    folder = tmp_path / "foreign"
    folder.mkdir()
    as_video2dataset(
        folder, "00000", {"000000000": (media["plain"], "a  cat,\n三只猫"), "000000001": (media["sound"], None)}
    )
    as_video2dataset(
        folder, "00001", {"000010000": (media["turned"], "a dog"), "000010001": (media["two"], "two things")}
    )
    return folder


def built(folder: Path) -> list[tuple[dict[str, Any], bytes]]:
    """Return K.json and the media of every sample of a finished folder."""
    reader = ShardReader(folder)
    return [
        (
            json.loads(reader.read(row.shard, row.json_offset, row.json_length)),
            reader.read(row.shard, row.media_offset, row.media_length),
        )
        for row in read_manifest(folder).rows()
    ]


def failures_of(folder: Path) -> dict[str, str]:
    rows = [json.loads(line) for line in (folder / "failures.jsonl").read_text().splitlines()]
    return {row["uri"]: row["reason"] for row in rows}


def uris(where: Path | str, report: Report | None = None) -> list[str]:
    return [source.uri for source in find(str(where), report or Report())[0]]


def test_tars_give_the_samples_that_their_files_would_give_loose(foreign: Path, tmp_path: Path) -> None:
    for tar in foreign.glob("*.tar"):
        with tarfile.open(tar) as opened:
            opened.extractall(tmp_path / "loose" / tar.name, filter="data")
    assert main([f"input={foreign}", f"output={tmp_path / 'a'}", "workers=2"]) == 0
    assert main([f"input={tmp_path / 'loose'}", f"output={tmp_path / 'b'}", "workers=1"]) == 0
    tars, loose = built(tmp_path / "a"), built(tmp_path / "b")
    assert [record["source"] for record, _ in tars] == [record["source"] for record, _ in loose]
    assert [(record["video"], record["scores"], data) for record, data in tars] == [
        (record["video"], record["scores"], data) for record, data in loose
    ]
    texts = {record["source"]["uri"]: [item["text"] for item in record["captions"]] for record, _ in tars}
    assert texts == {
        "00000.tar/000000000.mp4": ["a cat, 三只猫"],
        "00000.tar/000000001.mp4": [],
        "00001.tar/000010000.mp4": ["a dog"],
        "00001.tar/000010001.mp4": [],  # became two clips, of which it does not say which is which
    }
    assert len(tars) == 5 and "two things" not in json.dumps([record for record, _ in tars])
    (left,) = [row for row in json.loads((tmp_path / "a/stats.json").read_text())["funnel"] if row["step"] == "ingest"]
    assert left["how"] == {"left out, not video or image": 2} and left["out"] == 4


def test_the_number_of_processes_does_not_change_a_byte_of_what_tars_give(foreign: Path, tmp_path: Path) -> None:
    for name, workers in (("a", 1), ("b", 2)):
        assert main([f"input={foreign}", f"output={tmp_path / name}", f"workers={workers}"]) == 0
    one, other = (
        {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()} for name in "ab"
    )
    assert one == other and "shard-000000.tar" in one


@pytest.mark.parametrize("format", FORMATS)
def test_damage_inside_a_tar_costs_what_is_damaged(tmp_path: Path, format: int) -> None:
    members: dict[str, bytes] = {}
    for seed, key in enumerate("abcdef"):
        members[f"{key}.mp4"] = write(tmp_path / "x.mp4", moving(6, seed=seed)).read_bytes()
        members[f"{key}.txt"] = b"a cat"
    path = tar_of(tmp_path / "x.tar", members, format)
    header, other, body = (offset_of(path, name) for name in ("b.mp4", "e.mp4", "d.mp4"))
    data = bytearray(path.read_bytes())
    for damaged in (header, other):
        data[damaged.offset_data - 512 : damaged.offset_data] = os.urandom(512)
    middle = body.offset_data + body.size // 2
    data[body.offset_data + 8 : middle] = bytes(middle - body.offset_data - 8)
    del data[offset_of(path, "f.mp4").offset_data + 700 :]
    path.write_bytes(data)
    assert main([f"input={path}", f"output={tmp_path / 'out'}", "workers=1"]) == 0
    assert [record["source"]["uri"] for record, _ in built(tmp_path / "out")] == ["x.tar/a.mp4", "x.tar/c.mp4"]
    assert all(record["captions"][0]["text"] == "a cat" for record, _ in built(tmp_path / "out"))
    reasons = failures_of(tmp_path / "out")
    assert set(reasons) == {"x.tar", "x.tar/b", "x.tar/e", "x.tar/d.mp4", "x.tar/f.mp4"}
    assert reasons["x.tar"] == f"is damaged at byte {header.offset} and in 1 more place"
    assert "no video or image, only txt" in reasons["x.tar/b"] and "cut off" in reasons["x.tar/f.mp4"]


def test_a_tar_to_which_another_was_appended_gives_both_whole(tmp_path: Path, media: dict[str, bytes]) -> None:
    parts = [tar_of(tmp_path / "x.tar", {f"{key}.mp4": media[key]}).read_bytes() for key in ("plain", "turned")]
    (tmp_path / "x.tar").write_bytes(b"".join(parts))
    report = Report()
    assert uris(tmp_path / "x.tar", report) == ["x.tar/plain.mp4", "x.tar/turned.mp4"] and report.failures == []


def test_what_is_no_tar_costs_itself_and_says_so(tmp_path: Path, media: dict[str, bytes]) -> None:
    whole = tar_of(tmp_path / "good.tar", {"plain.mp4": media["plain"]}).read_bytes()
    tar_of(tmp_path / "none.tar", {})
    (tmp_path / "noise.tar").write_bytes(os.urandom(5000))
    (tmp_path / "packed.tar").write_bytes(gzip.compress(whole))
    (tmp_path / "zero.tar").touch()
    (tmp_path / "gone.tar").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.tar")
    report = Report()
    assert uris(tmp_path, report) == ["good.tar/plain.mp4"]
    assert {failure.uri: failure.reason for failure in report.failures} == {
        "gone.tar": "cannot be read: No such file or directory",
        "noise.tar": "is not a tar",
        "none.tar": "is an empty tar",
        "packed.tar": "is compressed with gzip, in which nothing can be found by its place; "
        "rename it to .tar.gz and gunzip it",
        "pipe.tar": "is not a file but a pipe, a socket or a device",
        "zero.tar": "is an empty tar",
    }


def test_tars_without_anything_usable_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tar_of(tmp_path / "a.tar", {"a.txt": b"a cat", "a.mp3": b"x"})
    assert main([f"input={tmp_path}", f"output={tmp_path / 'out'}"]) == 2
    error = capsys.readouterr().err
    assert "holds no videos or images" in error and "a.tar/a: has no video or image, only mp3, txt" in error
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()


def test_an_indexed_folder_says_how_to_build_from_its_tars(
    foreign: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (foreign / "dataset.json").write_text("{}")
    assert main([f"input={foreign}", f"output={tmp_path / 'out'}"]) == 2
    assert f"give input='{foreign}/*.tar'" in capsys.readouterr().err
    assert len(uris(f"{foreign}/*.tar")) == 4


def test_members_are_found_by_their_names_in_any_folder_of_a_tar(tmp_path: Path) -> None:
    still = encode_png(picture())
    captioned = {"./a/one.mp4": b"1", "./a/one.png": still, "./a/one.txt": b"one", "b/one.TXT": b"2", "b/one.MP4": b"2"}
    dotted = {"talk.part1.mp4": b"3", "talk.part1.txt": b"first", "talk.part2.mp4": b"4", "talk.txt": b"of both"}
    members = captioned | dotted | {"._one.mp4": b"", ".hidden": b"", "README": b"", "still.png": still}
    members |= {"x.resized.mp4": b"5", "x.txt": b"5"}
    tar_of(tmp_path / "x.tar", members)
    (tmp_path / "sub").mkdir()
    os.replace(tmp_path / "x.tar", tmp_path / "sub/x.tar")
    report = Report()
    sources = find(str(tmp_path), report)[0]
    assert [
        (source.uri.removeprefix("sub/x.tar/"), source.kind, [item.text for item in source.captions])
        for source in sources
    ] == [
        ("a/one.mp4", "video", ["one"]),
        ("b/one.MP4", "video", ["2"]),
        ("talk.part1.mp4", "video", ["first"]),
        ("talk.part2.mp4", "video", ["talk"]),  # only its name
        ("still.png", "image", ["still"]),
        ("x.resized.mp4", "video", ["5"]),
    ]
    assert report.failures == []


def test_captions_in_tars_are_read_as_they_are_beside_files(tmp_path: Path) -> None:
    typed = [{"type": "short", "text": "a cat", "model": "m", "lang": "en"}, {"type": "long", "text": "a  cat sits"}]
    tar_of(
        tmp_path / "x.tar",
        {
            **{"1.mp4": b"x", "1.txt": b"a cat", "1.json": b'{"caption": "a cat"}'},
            **{"2.mp4": b"x", "2.json": b'{"caption": null, "text": "a dog"}'},
            **{"3.mp4": b"x", "3.json": json.dumps({"captions": typed}).encode()},
            **{"4.mp4": b"x", "4.json": b"{broken"},
            **{"5.mp4": b"x", "5.txt": b"\xff\xfe"},
        },
    )
    report = Report()
    sources = find(str(tmp_path), report)[0]
    found = [[(item.type, item.text, item.model, item.lang) for item in source.captions] for source in sources]
    assert found[:2] == [[("gt", "a cat", "", "")], [("gt", "a dog", "", "")]]
    assert found[2:] == [[("short", "a cat", "m", "en"), ("long", "a cat sits", "", "")], [], []]
    assert [failure.uri for failure in report.failures] == ["x.tar/4.mp4", "x.tar/5.mp4"]
    assert "4.json" in report.failures[0].reason and "5.txt" in report.failures[1].reason


def test_a_caption_that_changes_inside_a_tar_is_a_changed_input(tmp_path: Path) -> None:
    listings = []
    for caption in (b"a cat", b"a dog"):
        tar_of(tmp_path / "x.tar", {"1.mp4": b"x", "1.txt": caption})
        listings.append(find(str(tmp_path), Report())[1])
    assert listings[0] != listings[1]


def test_a_member_is_a_file_that_ends_where_it_ends(tmp_path: Path) -> None:
    path = tar_of(tmp_path / "x.tar", {"a.bin": bytes(range(200)), "b.bin": b"other"})
    info = offset_of(path, "a.bin")
    member = Member(path, "a.bin", info.offset_data, info.size)
    assert member.read_bytes() == bytes(range(200)) and (member.suffix, member.stem) == (".bin", "a")
    with member.open() as file:
        assert file.seek(-3, os.SEEK_END) == 197 and file.read(50) == bytes((197, 198, 199)) and file.read() == b""
        assert file.seek(0) == 0 and file.read(2) == b"\0\1" and file.seek(500) == 500 and file.read(1) == b""
        with pytest.raises(ValueError, match="negative"):
            file.seek(-1)
        raw = file.raw  # type: ignore[attr-defined]
    assert isinstance(raw, Window) and raw.closed and raw._file.closed


def test_a_sample_of_a_tar_fails_with_the_reason_that_its_file_would(tmp_path: Path, media: dict[str, bytes]) -> None:
    sound = write_sound(tmp_path / "sound.mp4").read_bytes()
    members = {"ok.mp4": media["plain"], "sound.mp4": sound, "empty.mp4": b"", "noise.mp4": bytes(range(256)) * 9}
    members["cut.mp4"] = media["plain"][: media["plain"].index(b"moov") - 4]
    tar_of(tmp_path / "x.tar", members)
    assert main([f"input={tmp_path / 'x.tar'}", f"output={tmp_path / 'out'}", "workers=1"]) == 0
    reasons = failures_of(tmp_path / "out")
    assert reasons.pop("x.tar/cut.mp4").startswith("its index (moov) is missing")
    assert reasons == {
        "x.tar/sound.mp4": "has no video stream, only audio",
        "x.tar/empty.mp4": "the file is empty (zero bytes)",
        "x.tar/noise.mp4": "not a video or image that FFmpeg can read",
    }
