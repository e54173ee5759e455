"""Promises about shards, their index, and what is left in the output folder at any moment."""

from __future__ import annotations

import json
import tarfile
import zlib
from pathlib import Path

import pytest

from data_prep import output
from data_prep.pack import Report, pack, read_report, unit_done, write_unit
from data_prep.records import Caption, Failure, Sample, key_of, make_sample
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader
from soratrain.errors import ConfigError, DataError


def sample(number: int, uri: str = "", size: int = 2000) -> Sample:
    return make_sample(
        source={"id": f"id{number}", "uri": uri or f"{number}.mp4", "start_us": 0, "end_us": 2_125_000, "license": ""},
        kind="video",
        ext="mp4",
        media=bytes([number]) * size,
        video={
            "w": 64,
            "h": 48,
            "fps": [8, 1],
            "frames": 17,
            "codec": "h264",
            "pix_fmt": "yuv420p",
            "gop": 16,
            "orig": {},
        },
        captions=(Caption("gt", 'a, "b" — 三只猫'),),
        prep={"config_hash": "0", "versions": {}},
    )


def packed(tmp_path: Path, samples: list[list[Sample]], **settings: int) -> Report:
    report = Report()
    for number, unit in enumerate(samples):
        write_unit(tmp_path / "units", number, iter(unit), Report())
    pack(tmp_path / "units", range(len(samples)), tmp_path / "out", report=report, **{"max_bytes": 1 << 20} | settings)
    return report


def test_the_same_content_under_two_names_is_no_near_duplicate_of_itself(tmp_path: Path) -> None:
    samples = [sample(1), sample(2), sample(1, uri="copy.mp4"), sample(3)]
    for item, bits in zip(samples, (0, 2**192 - 1, 0, 1), strict=True):
        item.record["scores"]["phash"] = f"{bits:048x}"
    report = packed(tmp_path, [samples])
    rows = read_manifest(tmp_path / "out").rows()
    reader = ShardReader(tmp_path / "out")
    found = {
        row.key: json.loads(reader.read(row.shard, row.json_offset, row.json_length))["scores"].get("duplicate_of")
        for row in rows
    }
    assert found == {samples[0].key: None, samples[1].key: None, samples[3].key: samples[0].key}
    assert report.tallies["transcode"].how == {"near duplicates of another, marked": 1}


def test_the_manifest_says_where_each_member_lies(tmp_path: Path) -> None:
    packed(tmp_path, [[sample(1), sample(2)], [sample(3)]])
    manifest = read_manifest(tmp_path / "out")
    assert len(manifest) == 3
    for row in manifest.rows():
        data = (tmp_path / "out" / row.shard).read_bytes()
        media = data[row.media_offset : row.media_offset + row.media_length]
        record = json.loads(data[row.json_offset : row.json_offset + row.json_length])
        assert zlib.crc32(media) == row.crc32 and record["key"] == row.key
        assert (row.w, row.h, row.frames, row.fps_num, row.fps_den) == (64, 48, 17, 8, 1)
        assert record["captions"][0]["text"] == 'a, "b" — 三只猫'
        assert set(record) == {"schema", "key", "source", "video", "scores", "captions", "prep"}


def test_members_of_a_sample_are_adjacent_and_json_comes_first(tmp_path: Path) -> None:
    packed(tmp_path, [[sample(1), sample(2)]])
    with tarfile.open(tmp_path / "out/shard-000000.tar") as tar:
        names = tar.getnames()
    assert names == [f"{key_of(f'id{n}', 0, 2_125_000)}.{ext}" for n in (1, 2) for ext in ("json", "mp4")]


def test_how_work_was_divided_does_not_change_the_shards(tmp_path: Path) -> None:
    samples = [sample(number) for number in range(6)]
    packed(tmp_path / "a", [samples])
    packed(tmp_path / "b", [samples[:1], samples[1:5], [], samples[5:]])
    first, second = ((tmp_path / name / "out/shard-000000.tar").read_bytes() for name in "ab")
    assert first == second


def test_shards_end_at_the_size_asked_for(tmp_path: Path) -> None:
    packed(tmp_path, [[sample(number, size=400_000) for number in range(5)]])
    assert sorted(path.name for path in (tmp_path / "out").glob("*.tar")) == [f"shard-00000{n}.tar" for n in range(3)]


def test_the_same_content_under_two_names_gets_in_once(tmp_path: Path) -> None:
    report = packed(tmp_path, [[sample(1, "a.mp4")], [sample(2, "b.mp4"), sample(1, "copy.mp4")]])
    assert len(read_manifest(tmp_path / "out")) == 2
    assert [(item.uri, item.step) for item in report.failures] == [("copy.mp4", "pack")]
    assert "a.mp4" in report.failures[0].reason


def test_a_unit_keeps_its_report_and_is_done_only_when_whole(tmp_path: Path) -> None:
    report = Report()

    def broken():  # noqa: ANN202
        yield sample(1)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        write_unit(tmp_path, 0, broken(), report)
    assert not unit_done(tmp_path, 0) and list(tmp_path.iterdir()) == []
    report.tally("probe", "files").dropped["empty"] += 2
    report.failures.append(Failure("ü.mp4", "probe", "empty"))
    write_unit(tmp_path, 0, [], report)
    assert unit_done(tmp_path, 0) and read_report(tmp_path, 0) == report


IDENTITY = output.Identity({"task": "build", "input": "a", "world": {"clips": 3}}, "listing")
OTHER = output.Identity({"task": "build", "input": "a", "world": {"clips": 4}}, "listing")


def finished(folder: Path, identity: output.Identity = IDENTITY) -> None:
    """Make a finished build with one shard named after its settings."""
    output.claim(folder, identity, fresh=True)
    (folder / output.BUILDING / "shards/manifest").mkdir(parents=True)
    name = f"shard-{identity.settings['world']['clips']}.tar"
    (folder / output.BUILDING / "shards" / name).touch()
    (folder / output.BUILDING / "shards/manifest/part-00000.parquet").touch()
    described = {"settings": identity.settings, "listing": identity.listing, "shards": [{"name": name}]}
    output.publish(folder, described)


def test_the_same_command_finds_its_work_done(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    assert output.claim(tmp_path / "out", IDENTITY, fresh=False) == "done"
    assert not (tmp_path / "out" / output.BUILDING).exists()


def test_an_unfinished_build_is_continued(tmp_path: Path) -> None:
    assert output.claim(tmp_path / "out", IDENTITY, fresh=False) == "new"
    assert output.claim(tmp_path / "out", IDENTITY, fresh=False) == "continue"


def test_other_settings_are_refused_by_name_until_fresh_replaces_all_of_it(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"world\.clips=3 \(now 4\).*fresh=true"):
        output.claim(tmp_path / "out", OTHER, fresh=False)
    finished(tmp_path / "out", OTHER)
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shard-4.tar"]


def test_an_unfinished_build_with_other_settings_is_refused_too(tmp_path: Path) -> None:
    output.claim(tmp_path / "out", IDENTITY, fresh=False)
    with pytest.raises(ConfigError, match="unfinished"):
        output.claim(tmp_path / "out", OTHER, fresh=False)
    assert output.claim(tmp_path / "out", OTHER, fresh=True) == "new"


def test_input_that_has_changed_since_is_not_taken_for_done(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    with pytest.raises(ConfigError, match="changed since"):
        output.claim(tmp_path / "out", output.Identity(IDENTITY.settings, "longer"), fresh=False)


def test_what_was_there_stays_until_its_replacement_is_whole(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    output.claim(tmp_path / "out", OTHER, fresh=True)
    assert (tmp_path / "out/dataset.json").is_file() and (tmp_path / "out/shard-3.tar").is_file()


def test_a_publication_that_was_interrupted_can_be_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finished(tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(output, "write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, FileNotFoundError)):
            output.claim(tmp_path / "out", OTHER, fresh=True)
    finished(tmp_path / "out", OTHER)
    shards = tmp_path / "out" / output.BUILDING / "shards"
    output.claim(tmp_path / "out", IDENTITY, fresh=True)
    shards.mkdir(parents=True)
    (shards / "shard-3.tar").touch()
    with monkeypatch.context() as patched:
        patched.setattr(output, "write_json", lambda path, value: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            output.publish(tmp_path / "out", {"shards": [{"name": "shard-3.tar"}]})
    assert not (tmp_path / "out/dataset.json").exists()
    assert output.claim(tmp_path / "out", IDENTITY, fresh=False) == "continue"
    output.publish(tmp_path / "out", {"settings": IDENTITY.settings, "listing": "listing", "shards": []})
    assert [path.name for path in (tmp_path / "out").glob("*.tar")] == ["shard-3.tar"]


@pytest.mark.parametrize("fresh", [False, True])
def test_files_of_somebody_else_are_never_touched(tmp_path: Path, fresh: bool) -> None:
    (tmp_path / "mine.txt").write_text("keep")
    (tmp_path / "dataset.json").write_text('{"name": "another program\'s"}')
    with pytest.raises(DataError, match="did not make"):
        output.claim(tmp_path, IDENTITY, fresh=fresh)
    assert (tmp_path / "mine.txt").read_text() == "keep"


def test_replacing_keeps_what_others_put_beside_the_shards(tmp_path: Path) -> None:
    finished(tmp_path / "out")
    (tmp_path / "out/notes.md").write_text("mine")
    finished(tmp_path / "out", OTHER)
    assert (tmp_path / "out/notes.md").read_text() == "mine"


def test_discarding_leaves_nothing_behind(tmp_path: Path) -> None:
    output.claim(tmp_path / "out", IDENTITY, fresh=False)
    output.discard(tmp_path / "out")
    assert not (tmp_path / "out").exists()
