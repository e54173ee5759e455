"""Promises of task=select: what is left out and why, from scores alone, without touching a shard."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from shutil import copytree

import av
import numpy as np
import pytest
from prep_clips import picture, write

from data_prep.__main__ import main
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished folder: two pans, a copy of one, a slide, a black clip, and a still."""
    folder = tmp_path_factory.mktemp("select")
    videos = folder / "videos"
    videos.mkdir()
    pans = {seed: [np.roll(picture(96, 128, seed), 2 * step, axis=1) for step in range(20)] for seed in (1, 2)}
    write(videos / "a slow.mp4", pans[1])
    write(videos / "b fast.mp4", [np.roll(picture(96, 128, 2), 9 * step, axis=1) for step in range(20)])
    write(videos / "c copy.mkv", pans[1], options={"crf": "24"})
    write(videos / "d slide.mp4", [picture(96, 128, 4)] * 20)
    write(videos / "e black.mp4", [np.zeros((96, 128, 3), np.uint8)] * 20)
    from data_prep.encode import encode_png

    (videos / "f still.png").write_bytes(encode_png(picture(96, 128, 5)))
    assert main([f"input={videos}", f"output={folder / 'built'}"]) == 0
    return folder / "built"


def select(built: Path, out: Path, *argv: str) -> tuple[set[str], dict[str, str]]:
    """Return the sources that are kept, and why each other sample is not."""
    assert main(["task=select", f"input={built}", f"output={out}", *argv]) == 0
    lines = (out / "failures.jsonl").read_text().splitlines()
    names = sources(built)
    return set(sources(out).values()), {names[row["uri"]]: row["reason"] for row in map(json.loads, lines)}


def sources(folder: Path) -> dict[str, str]:
    reader = ShardReader(folder)
    return {
        row.key: json.loads(reader.read(row.shard, row.json_offset, row.json_length))["source"]["uri"][0]
        for row in read_manifest(folder).rows()
    }


def test_by_default_slides_black_clips_and_copies_are_left_out_with_their_reasons(built: Path, tmp_path: Path) -> None:
    kept, dropped = select(built, tmp_path / "out")
    assert kept == {"a", "b", "f"}
    first = next(key for key, name in sources(built).items() if name == "a")
    assert dropped == {"c": f"like {first}", "d": "select.max_static=0.9: 1", "e": "select.max_black=0.5: 1"}
    (row,) = json.loads((tmp_path / "out/stats.json").read_text())["funnel"]
    assert (row["in"], row["out"], sum(row["dropped"].values())) == (6, 3, 3)


def test_the_summary_lists_each_rule_once(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["select.min_motion=0.35", "select.max_static=null", "select.max_black=null"]
    _, dropped = select(built, tmp_path / "out", *argv)
    assert len(set(dropped.values())) > 2
    lines = [line.strip() for line in capsys.readouterr().out.splitlines() if " × " in line]
    ruled = sum(reason.startswith("select.min_motion") for reason in dropped.values())
    assert ruled > 1 and f"{ruled} × select.min_motion=0.35" in lines and len(lines) == len(set(lines)) <= 2


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [
        ("select.min_motion=0.25", "bf"),
        ("select.max_motion=0.25", "af"),
        ("select.duplicates=keep", "abcf"),
        ("select.max_static=null", "abdf"),
        ("select.min_seconds=2.5", "f"),
        ("select.max_aspect=1.4", "abf"),
    ],
)
def test_a_threshold_does_what_it_says(built: Path, tmp_path: Path, threshold: str, kept: str) -> None:
    assert select(built, tmp_path / "out", threshold)[0] == set(kept)


def test_selecting_decodes_nothing_and_changes_no_shard(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in built.glob("*.tar")}
    monkeypatch.setattr("data_prep.select.write_report", lambda folder: None)  # which has pictures
    monkeypatch.setattr(av, "open", lambda *_, **__: pytest.fail("something was decoded"))
    select(built, tmp_path / "out")
    after = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (tmp_path / "out").glob("*.tar")}
    assert before == after
    assert all(path.samefile(built / path.name) for path in (tmp_path / "out").glob("*.tar"))


def test_the_same_command_is_done_and_another_threshold_is_refused(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["task=select", f"input={built}", f"output={tmp_path / 'out'}"]
    assert main(argv) == 0 and main(argv) == 0
    assert "is complete" in capsys.readouterr().out
    assert main([*argv, "select.min_side=17"]) == 2
    assert "select.min_side=None (now 17)" in capsys.readouterr().err
    assert main([*argv, "select.min_side=17", "fresh=true"]) == 0


def test_what_lets_nothing_through_is_one_line_and_leaves_nothing(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["task=select", f"input={built}", f"output={tmp_path / 'out'}", "select.min_side=1000"]) == 2
    assert "none of 6 samples passes: select.min_side=1000 (6)" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    before = (built / "dataset.json").read_bytes()
    assert main(["task=select", f"input={built}", f"output={built}", "fresh=true"]) == 2
    assert "is the input" in capsys.readouterr().err and (built / "dataset.json").read_bytes() == before
    assert main(["task=select", f"input={tmp_path}", f"output={tmp_path / 'out'}"]) == 2
    assert "no folder that data_prep has finished" in capsys.readouterr().err


@pytest.mark.parametrize("task", ["select", "repack"])
def test_a_folder_that_lacks_a_shard_or_is_described_by_nothing_is_one_line(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], task: str
) -> None:
    broken = tmp_path / "broken"
    copytree(built, broken)
    (broken / "shard-000000.tar").unlink()
    for text, said in ((None, "shard-000000.tar is not there"), ("{", "no folder that"), ("[]", "no folder that")):
        if text is not None:
            (broken / "dataset.json").write_text(text)
        assert main([f"task={task}", f"input={broken}", f"output={tmp_path / 'out'}"]) == 2
        assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_threshold_on_a_score_that_no_sample_has_is_refused_and_defaults_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["input=world", "world.clips=2", f"output={tmp_path / 'world'}"]) == 0
    argv = ["task=select", f"input={tmp_path / 'world'}", f"output={tmp_path / 'out'}"]
    for threshold, score in (
        ("min_motion=0.5", "motion"),
        ("max_black=0.1", "black"),
        ("min_aesthetic=5", "aesthetic"),
    ):
        assert main([*argv, f"select.{threshold}"]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"error: select.{threshold}: input={tmp_path / 'world'} has no {score}, which task=")
        assert said.count("\n") == 1 and not (tmp_path / "out").exists()
    assert main(argv) == 0
