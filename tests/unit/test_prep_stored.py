"""Promises about captions that change: a finished folder takes them over without decoding, as if built anew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prep_clips import moving, write

from data_prep import build, output
from data_prep.__main__ import main
from data_prep.encode import encode_png
from data_prep.files import SEVERAL

FIRST = {"one": "a cat", "two": "two shots", "other": "stays"}
SECOND = {"two_alike": "also two shots", "one": "a dog", "damaged": "damaged", "other": "stays"}


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Files that become one clip, several, one as another's double, a part, and images over several shards."""
    folder = tmp_path / "clips"
    folder.mkdir()
    write(folder / "one.mp4", moving(8))
    write(folder / "one_alike.mp4", moving(8), options={"crf": "30"})
    write(folder / "other.mp4", moving(8, seed=2))
    write(folder / "two.mp4", [*moving(12, seed=1), *[255 - frame for frame in moving(12, seed=5)]])
    (folder / "two_alike.mp4").write_bytes((folder / "two.mp4").read_bytes())
    data = write(folder / "damaged.mp4", moving(30), options={"crf": "0"}).read_bytes()
    (folder / "damaged.mp4").write_bytes(data[: len(data) // 2] + b"\xaa" * 400 + data[len(data) // 2 + 400 :])
    (folder / "not.mp4").write_text("no video")
    for seed in range(3):
        noise = np.random.default_rng(seed).integers(0, 255, (400, 500, 3), np.uint8)
        (folder / f"image{seed}.png").write_bytes(encode_png(noise))
    return folder


def command(clips: Path, out: str, said: dict[str, str]) -> list[str]:
    table = clips.parent / "table.jsonl"
    table.write_text("".join(json.dumps({"id": name, "text": text}) + "\n" for name, text in said.items()))
    return [f"input={clips}", f"output={clips.parent / out}", f"captions={table}", "shards.mb=1"]


def held(folder: Path) -> dict[str, bytes]:
    """Return every file of a folder but the page with pictures of what was dropped, which come from the input."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "report.html"
    }


@pytest.fixture
def anew(clips: Path) -> Iterator[dict[str, bytes]]:
    """What a build with the second captions holds; `out` has the first, and no file can be decoded any more."""
    assert main(command(clips, "anew", SECOND)) == 0
    assert main(command(clips, "out", FIRST)) == 0
    for path in clips.iterdir():
        path.write_bytes(bytes(path.stat().st_size))
    yield held(clips.parent / "anew")


def test_changed_captions_are_taken_over_without_decoding_to_what_a_new_build_gives(
    clips: Path, anew: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    before = held(clips.parent / "out")
    again = command(clips, "out", SECOND)
    assert main(again) == 2
    assert "was made with other captions of the same files; fresh=true takes these" in capsys.readouterr().err
    assert held(clips.parent / "out") == before != anew
    assert main([*again, "fresh=true"]) == 0
    assert "only captions have changed" in capsys.readouterr().out
    after = held(clips.parent / "out")
    assert after == anew and sum(name.endswith(".tar") for name in after) > 2
    failures = [json.loads(line) for line in after["failures.jsonl"].splitlines()]
    assert [item["uri"] for item in failures if item["reason"] == SEVERAL] == ["two_alike.mp4"]
    assert main(again) == 0 and "is complete" in capsys.readouterr().out


def test_a_file_of_which_a_clip_was_lost_is_known_to_be_several(clips: Path, anew: dict[str, bytes]) -> None:
    failures = clips.parent / "out/failures.jsonl"
    lost = {"uri": "one.mp4", "step": "transcode", "reason": "lost", "used": "its first 1 clip"}
    failures.write_text(failures.read_text() + json.dumps(lost) + "\n")
    assert main([*command(clips, "out", SECOND), "fresh=true"]) == 0
    found = [(item["uri"], item["reason"]) for item in map(json.loads, failures.read_text().splitlines())]
    place = found.index(("one.mp4", SEVERAL))
    assert found[place + 1] == ("one.mp4", "lost") and ("two_alike.mp4", SEVERAL) in found


def test_captions_beside_files_may_change_as_well(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"input={clips}", f"output={clips.parent / 'out'}"]
    (clips / "one.txt").write_text("a cat")
    assert main(words) == 0
    (clips / "one.txt").write_text("a cat, asleep")
    assert main([*words, "fresh=true"]) == 0 and "only captions have changed" in capsys.readouterr().out
    assert b'"a cat, asleep"' in b"".join(held(clips.parent / "out").values())


@pytest.mark.parametrize("at", ["pack", "publish"])
def test_an_interruption_while_captions_are_taken_over_loses_nothing(
    clips: Path, anew: dict[str, bytes], at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    def stop_at_the_end(path: Path, value: Any) -> None:
        if path.name == "dataset.json":
            raise KeyboardInterrupt
        write_json(path, value)

    write_json = output.write_json
    again = command(clips, "out", SECOND)
    with monkeypatch.context() as patch:
        if at == "pack":
            patch.setattr(build, "pack", stop)
        else:
            patch.setattr(output, "write_json", stop_at_the_end)
        assert main([*again, "fresh=true"]) == 130
    assert main(again) == 0
    assert held(clips.parent / "out") == anew


def test_a_changed_file_is_decoded_again(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command(clips, "out", FIRST)) == 0
    write(clips / "one.mp4", moving(9))
    assert main(command(clips, "anew", SECOND)) == 0
    again = command(clips, "out", SECOND)
    capsys.readouterr()
    assert main(again) == 2 and "files added, removed or of another size" in capsys.readouterr().err
    assert main([*again, "fresh=true"]) == 0 and "only captions" not in capsys.readouterr().out
    assert held(clips.parent / "out") == held(clips.parent / "anew")


def test_a_damaged_shard_is_not_taken_over(
    clips: Path, anew: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    shard = max((clips.parent / "out").glob("*.tar"), key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    assert main([*command(clips, "out", SECOND), "fresh=true"]) == 2
    assert f"{shard.name} is damaged at sample" in capsys.readouterr().err
    assert shard.read_bytes() == data
