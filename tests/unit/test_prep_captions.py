"""Promises about a table of captions: each row finds its file or is counted, and no caption gets onto another clip."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from caption_tables import NAMES, Rows, captions, folder_of, table_of, texts
from prep_clips import moving, write

from data_prep.__main__ import main
from data_prep.captions import FILE, TEXT
from data_prep.ingest import find
from data_prep.pack import Report
from data_prep.records import Caption
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    return folder_of(tmp_path / "clips", "a1.mp4", "sub/b1.mov", "c1.png")


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "parquet"])
def test_every_kind_of_table_gives_the_same_captions(tmp_path: Path, clips: Path, kind: str) -> None:
    rows: Rows = [
        {"path": "a1.mp4", "caption": 'a "cat",\tasleep\nin the sun', "type": "short", "lang": "en"},
        {"path": "sub/b1.mov", "caption": "三只猫", "type": "", "lang": "zh"},
        {"path": "a1.mp4", "caption": "a cat", "type": "long", "lang": ""},
    ]
    report = Report()
    assert captions(clips, table_of(tmp_path / f"t.{kind}", rows), report) == {
        "a1.mp4": [("short", 'a "cat", asleep in the sun', "en"), ("long", "a cat", "")],
        "c1.png": [],
        "sub/b1.mov": [("gt", "三只猫", "zh")],
    }
    assert report.captions is not None and report.captions.files == 2 and report.captions.no_row == ("c1.png",)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_cell_may_hold_a_list_of_captions_or_none(tmp_path: Path, clips: Path, kind: str) -> None:
    rows: Rows = [{"file": "a1.mp4", "captions": ["one", None, "two", "one"]}, {"file": "c1.png", "captions": None}]
    assert texts(clips, table_of(tmp_path / f"t.{kind}", rows)) == {
        "a1.mp4": ["one", "two"],
        "c1.png": [],
        "sub/b1.mov": [],
    }


@pytest.mark.parametrize("file", FILE)
@pytest.mark.parametrize("text", TEXT)
def test_columns_are_known_by_their_names(tmp_path: Path, clips: Path, file: str, text: str) -> None:
    table = table_of(tmp_path / "t.csv", [{"views": "9", text.upper(): "a cat", file.title(): "a1.mp4"}])
    assert texts(clips, table)["a1.mp4"] == ["a cat"]


def test_several_columns_of_text_are_several_captions_and_others_can_be_asked_for(tmp_path: Path, clips: Path) -> None:
    row = {"clip, so": "a1.mp4", "text": "t", "caption": "c", "dense": "d", "kind": "camera", "type": "mp4"}
    table = table_of(tmp_path / "t.csv", [row])
    file = {"file": "clip, so"}
    with pytest.raises(DataError, match="'mp4' is no type of caption; use one of gt, short"):
        texts(clips, table, **file)
    assert captions(clips, table, type="none", **file)["a1.mp4"] == [("gt", "c", ""), ("gt", "t", "")]
    assert captions(clips, table, type="kind", text="dense, text", **file)["a1.mp4"] == [
        ("camera", "d", ""),
        ("camera", "t", ""),
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_known_by_its_path_else_by_its_base_name_else_by_its_stem(
    tmp_path: Path, clips: Path, name: str
) -> None:
    report = Report()
    table = table_of(tmp_path / "t.csv", [{"path": name.format(clips=clips), "caption": "a dog"}])
    assert captions(clips, table, report)["sub/b1.mov"] == [("gt", "a dog", "")]
    assert report.captions is not None and report.captions.by == {NAMES[name]: 1}


def test_a_path_may_be_from_where_we_are(tmp_path: Path, clips: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of(clips, "b1.mov")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tables").mkdir()
    table = table_of(tmp_path / "tables/t.csv", [{"path": "clips/sub/b1.mov", "caption": "a dog"}])
    assert texts("clips", table)["sub/b1.mov"] == ["a dog"]


def test_a_part_of_a_path_that_two_files_or_two_names_have_means_none(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clips", "x/a1.mp4", "y/a1.mp4", "b1.mp4", "b1.png", "c1.mp4", "d1.mp4")
    rows = [{"path": name, "text": name} for name in ("a1.mp4", "b1", "p/c1.mp4", "q/c1.mp4", "d1", "d1.mkv", "x/a1")]
    report = Report()
    found = captions(folder, table_of(tmp_path / "t.csv", rows), report)
    assert {uri: item for uri, item in found.items() if item} == {"x/a1.mp4": [("gt", "x/a1", "")]}
    assert report.captions is not None
    assert report.captions.no_file == ("a1.mp4", "b1", "p/c1.mp4", "q/c1.mp4", "d1", "d1.mkv")


def test_names_match_in_whichever_form_their_letters_are_composed(tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "clips", "cafe\u0301 1.mp4")
    table = table_of(tmp_path / "t.csv", [{"path": "caf\u00e9 1.mp4", "text": "a café"}])
    assert list(texts(folder, table).values()) == [["a café"]]


def test_what_a_list_and_a_glob_name_is_found_by_the_table_too(tmp_path: Path, clips: Path) -> None:
    (tmp_path / "list.txt").write_text(f"clips/a1.mp4\n{clips}/sub/b1.mov\n")
    rows = [{"path": "clips/a1.mp4", "text": "a cat"}, {"path": str(clips / "sub/b1.mov"), "text": "a dog"}]
    table = table_of(tmp_path / "t.csv", rows)
    for where in (tmp_path / "list.txt", clips / "**/*1.m*"):
        assert sorted(texts(where, table).values()) == [["a cat"], ["a dog"]]


def test_of_several_columns_with_names_the_one_that_finds_most_is_taken(tmp_path: Path, clips: Path) -> None:
    rows: Rows = [
        {"id": "a1", "url": "https://host/1", "text": "a cat"},
        {"id": "b1", "url": "https://host/c1.png", "text": "a dog"},
    ]
    report = Report()
    assert captions(clips, table_of(tmp_path / "t.jsonl", rows), report)["a1.mp4"] == [("gt", "a cat", "")]
    assert report.captions is not None and report.captions.column == "id"


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_metadata_in_the_folder_is_found_by_itself(clips: Path, kind: str) -> None:
    table_of(clips / f"metadata.{kind}", [{"file_name": "a1.mp4", "text": "a cat"}])
    report = Report()
    assert captions(clips, None, report)["a1.mp4"] == [("gt", "a cat", "")]
    assert report.tallies["ingest"].how == {"with captions from metadata.csv".replace("csv", kind): 1}
    assert texts(clips, "none")["a1.mp4"] == []


def test_metadata_of_another_sort_is_left_alone(clips: Path) -> None:
    for row in ({"file_name": "a1.mp4", "label": "3"}, {"name": "a1.mp4", "text": "a cat"}):
        table_of(clips / "metadata.csv", [row])
        report = Report()
        assert captions(clips, None, report)["a1.mp4"] == []
        assert report.captions is None and report.tallies["ingest"].how == {"left out, not video or image": 1}
    assert texts(clips, None, file="name")["a1.mp4"] == ["a cat"]


def test_metadata_that_cannot_be_used_says_how_to_build_without_it(clips: Path) -> None:
    table_of(clips / "metadata.csv", [{"file_name": "z.mp4", "text": "a cat"}])
    table_of(clips / "metadata.jsonl", [{"file_name": "a1.mp4", "text": "a cat"}])
    with pytest.raises(
        DataError, match=r"has metadata.csv and metadata.jsonl; say which.*captions=none builds without"
    ):
        texts(clips, None)
    (clips / "metadata.csv").write_bytes(b"file_name,text\na1.mp4,caf\xe9\n")
    (clips / "metadata.jsonl").unlink()
    with pytest.raises(DataError, match="line 2 is not UTF-8.*captions=none builds without it"):
        texts(clips, None)


def test_the_table_wins_over_what_stands_beside_a_file_where_it_says_something(tmp_path: Path, clips: Path) -> None:
    for name in ("a1", "c1"):
        (clips / f"{name}.txt").write_text("beside")
    folder_of(clips, "a_running_dog.mp4")
    rows = [{"path": "a1.mp4", "text": "a cat"}, {"path": "c1.png", "text": " "}]
    report = Report()
    table = table_of(tmp_path / "t.csv", [*rows, {"path": "a_running_dog.mp4", "text": "a dog"}])
    found = captions(clips, table, report)
    assert {uri: [text for _, text, _ in item] for uri, item in found.items()} == {
        "a1.mp4": ["a cat"],
        "a_running_dog.mp4": ["a dog"],
        "c1.png": ["beside"],
        "sub/b1.mov": [],
    }
    assert report.captions is not None
    assert (report.captions.beside, report.captions.empty, report.captions.files) == (1, 1, 2)


def test_the_listing_changes_with_what_the_table_says_of_the_input_and_with_nothing_else_of_it(
    tmp_path: Path, clips: Path
) -> None:
    def listing(name: str, *rows: tuple[str, str]) -> str:
        table = table_of(tmp_path / name, [{"path": path, "text": text} for path, text in rows])
        return find(str(clips), Report(), str(table))[1]

    first = listing("t.csv", ("a1.mp4", "a cat"))
    assert listing("u.jsonl", ("gone.mp4", "a cow"), ("a1.mp4", "a cat")) == first
    assert listing("t.csv", ("a1.mp4", "a dog")) != first
    assert listing("t.csv", ("c1.png", "a cat")) != first


BAD = {
    "missing.csv": (None, "does not exist"),
    "t.xlsx": (b"x", "known names end in .csv, .tsv, .jsonl"),
    "empty.csv": (b"", "is empty; its first line should name the columns"),
    "head.csv": (b"path,text\n", "has no rows"),
    "nofile.csv": (b"name,text\na1.mp4,x\n", r"has no column path or file or .*captions_columns.file= \(name, text\)"),
    "notext.csv": (b"path,said\na1.mp4,x\n", r"has no column caption or .*captions_columns.text= \(path, said\)"),
    "twice.csv": (b"path,text,text\na1.mp4,x,y\n", "has several columns text"),
    "latin.csv": (b"path,text\na1.mp4,x\nb1.mov,caf\xe9\n", r"line 3 is not UTF-8 \(byte 0xe9\)"),
    "utf16.csv": ("path,text\na1.mp4,x\n".encode("utf-16"), "line 1 is not UTF-8"),
    "long.csv": (b"path,text\na1.mp4,a cat, asleep\n", 'line 2 has 3 cells and the head 2; .*stands in "quotes"'),
    "short.tsv": (b"path\ttext\na1.mp4\n", "line 2 has 1 cells and the head 2"),
    "quote.csv": (b'path,text\na1.mp4,"a cat\n', "line 2 cannot be read"),
    "list.jsonl": (b'["a1.mp4"]\n', "line 1 is not a JSON object"),
    "broken.jsonl": (b'{"path": "a1.mp4", "text": "x"}\n{"path": "a1', "line 2 is not JSON"),
    "latin.jsonl": (b'{"path": "a1.mp4", "text": "caf\xe9"}\n', "line 1 is not UTF-8"),
    "number.jsonl": (b'{"path": "a1.mp4", "text": 5}\n', "line 1: text holds '5', which is no text"),
    "half.jsonl": (b'{"path": "a1.mp4", "text": "\\ud800"}\n', "line 1: text cannot be written as UTF-8"),
    "none.jsonl": (b"\n", "is empty; each of its lines"),
    "t.parquet": (b"PAR1 but not more", "cannot be read as parquet"),
    "nothing.csv": (b"path,text\nz9.mp4,x\n", "none of its 1 rows names a file.*column path has 'z9.mp4'.*'a1.mp4'"),
    "unnamed.csv": (b"path,text\n,x\n", "column path has 'nothing'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_table_that_cannot_be_used_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    data, said = BAD[name]
    if data is not None:
        (tmp_path / name).write_bytes(data)
    assert main([f"input={clips}", f"output={tmp_path / 'out'}", f"captions={tmp_path / name}"]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: captions={tmp_path / name}: ") and printed.count("\n") == 1
    with pytest.raises(DataError, match=said):
        texts(clips, tmp_path / name)
    assert not (tmp_path / "out").exists()


def test_a_parquet_with_a_broken_page_or_text_says_after_which_row(tmp_path: Path, clips: Path) -> None:
    table = table_of(tmp_path / "t.parquet", [{"path": "a1.mp4", "text": "a cat" * 9}])
    data = table.read_bytes()
    table.write_bytes(data[:4] + b"\xff" * 40 + data[44:])
    with pytest.raises(DataError, match="cannot be read as parquet after row 0"):
        texts(clips, table)


def test_captions_asked_for_where_none_are_read_are_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for words in (["input=world", "captions=t.csv"], [f"input={tmp_path}", "task=index", "captions_columns.file=a"]):
        assert main(words) == 2 and "captions= and captions_columns.* are for task=build" in capsys.readouterr().err


def test_a_build_with_a_table_says_what_matched_and_ends_with_its_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for index, name in enumerate(("a1", "b1", "c1")):
        write(clips / f"{name}.mp4", moving(6, seed=index))
    (clips / "a1.txt").write_text("beside")
    rows = [{"clip": "a1", "said": "a cat"}, {"clip": "a1", "said": "a cat, asleep"}, {"clip": "zz", "said": "gone"}]
    table = table_of(tmp_path / "my, table.csv", rows)
    command = [f"input={clips}", f"output={tmp_path / 'out'}", f"captions={table}", "workers=1"]
    command += ["captions_columns.file=clip", "captions_columns.text=said"]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert "2 of 3 rows name a file in column clip (2 by stem)" in printed
    assert "1 row without a file, or not one alone: zz" in printed
    assert "2 files without a caption in it: b1.mp4, c1.mp4" in printed
    assert "1 file with captions beside them as well; those of the table are used" in printed
    stats = json.loads((tmp_path / "out/stats.json").read_text())["captions"]
    assert stats["rows_without_file"] == {"count": 1, "first": ["zz"]}
    assert stats["files_without_row"] == {"count": 2, "first": ["b1.mp4", "c1.mp4"]}
    reader = ShardReader(tmp_path / "out")
    records = [
        json.loads(reader.read(row.shard, row.json_offset, row.json_length))
        for row in read_manifest(tmp_path / "out").rows()
    ]
    found = {record["source"]["uri"]: [Caption(**item) for item in record["captions"]] for record in records}
    assert found == {
        "a1.mp4": [Caption("gt", "a cat"), Caption("gt", "a cat, asleep")],
        "b1.mp4": [],
        "c1.mp4": [],
    }
    assert main(command) == 0 and "is complete" in capsys.readouterr().out
    table.rename(tmp_path / "moved.csv")
    table_of(table, [{"clip": "a1", "said": "a dog"}])
    assert main(command) == 2
    assert "with other captions of the same files" in capsys.readouterr().err
