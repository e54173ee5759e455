"""Promises about whole runs of data_prep: the world, a folder of files, interruptions, and mistakes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path

import av
import numpy as np
import psutil
import pytest

from data_prep.__main__ import main
from data_prep.world import World, describe, render
from data_prep.world.captions import STYLES
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader

ROOT = Path(__file__).resolve().parents[2]


def run(*argv: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command as a user would, from another folder."""
    command = [sys.executable, "-m", "data_prep", *argv]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120, check=False)


def digests(folder: Path) -> dict[str, str]:
    """Return a hash of every file below a folder that says something about samples."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def samples(folder: Path) -> list[tuple[dict, list[np.ndarray]]]:
    """Return (K.json, RGB frames) of every sample."""
    import io

    reader, found = ShardReader(folder), []
    for row in read_manifest(folder).rows():
        record = json.loads(reader.read(row.shard, row.json_offset, row.json_length))
        with av.open(io.BytesIO(reader.read(row.shard, row.media_offset, row.media_length))) as file:
            found.append((record, [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]))
    return found


def test_the_world_comes_out_of_its_shards_as_it_was_drawn(tmp_path: Path) -> None:
    done = run("input=world", "output=shards", "world.clips=40", "workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = samples(tmp_path / "shards")
    world = World(preset="demo", seed=0)
    assert len(found) == 40 and {record["video"]["frames"] for record, _ in found} >= {1, 17}
    for index, (record, frames) in enumerate(found):
        scene = world.scene(index, split="train")
        drawn = render(scene)
        assert np.shape(frames) == drawn.shape and record["video"]["fps"] == [int(scene.fps), 1]
        assert np.abs(np.asarray(frames, int) - drawn).mean() < 6
        captions = {caption["type"]: caption["text"] for caption in record["captions"]}
        assert captions == {style: text for style in STYLES if (text := describe(scene, style=style))}
        assert captions.keys() == set(STYLES) - (set() if len(frames) > 1 else {"camera"})
        assert {(caption["model"], caption["lang"]) for caption in record["captions"]} == {("world", "en")}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]


def test_the_number_of_processes_does_not_change_a_byte(tmp_path: Path) -> None:
    for name, workers in (("one", "1"), ("two", "2")):
        done = run("input=world", f"output={name}", "world.clips=51", f"workers={workers}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert digests(tmp_path / "one") == digests(tmp_path / "two")


def test_the_same_command_again_does_nothing_and_another_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["input=world", f"output={tmp_path / 'w'}", "world.clips=5", "workers=1"]
    assert main(argv) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")}
    capsys.readouterr()
    assert main(argv) == 0 and "is complete" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "w").rglob("*")} == before
    assert main([*argv[:2], "world.clips=6"]) == 2
    assert "world.clips=5 (now 6)" in capsys.readouterr().err
    assert main([*argv[:2], "world.clips=6", "fresh=true", "workers=1"]) == 0
    assert len(read_manifest(tmp_path / "w")) == 6


@pytest.mark.full
@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_an_interrupted_build_is_continued_to_the_same_bytes(tmp_path: Path, sent: signal.Signals) -> None:
    argv = ["input=world", "world.clips=1500", "workers=2"]  # enough that the signal comes in the middle
    assert run(*argv, "output=whole", cwd=tmp_path).returncode == 0
    command = [sys.executable, "-m", "data_prep", *argv, "output=broken"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a suite run in the background ignores Ctrl-C
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, preexec_fn=heeded)
    units = tmp_path / "broken/.building/units"
    until = time.monotonic() + 60
    while len(list(units.glob("*.json"))) < 3:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert not (tmp_path / "broken/dataset.json").exists() and not list((tmp_path / "broken").glob("*.tar"))
    if sent == signal.SIGINT:
        assert process.returncode == 130 and b"the same command continues" in said and b"Traceback" not in said
    again = run(*argv, "output=broken", cwd=tmp_path)
    assert again.returncode == 0 and "continuing" in again.stdout
    assert digests(tmp_path / "broken") == digests(tmp_path / "whole")


def test_a_folder_of_good_and_bad_files_gives_the_good_ones_and_every_reason(tmp_path: Path) -> None:
    videos = tmp_path / 'my vidéos, "raw" (1)'
    (videos / "sub").mkdir(parents=True)
    write_clip(videos / "good 三只猫.mp4", 20)
    (videos / "sub/copy.mp4").write_bytes((videos / "good 三只猫.mp4").read_bytes())
    write_clip(videos / "sub/good.mkv", 11)
    (videos / "empty.mp4").touch()
    (videos / "noise.webm").write_bytes(np.random.default_rng(1).bytes(3000))
    (videos / "notes.pdf").touch()
    (videos / "good 三只猫.txt").write_text("three cats", encoding="utf-8")
    done = run(f"input={videos}", "output=out, (2)", "workers=1", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out, (2)"
    found = {record["source"]["uri"]: (record, frames) for record, frames in samples(out)}
    assert set(found) == {"good 三只猫.mp4", "sub/good.mkv"}
    assert [len(frames) for _, frames in found.values()] == [20, 11]
    assert [item["text"] for item in found["good 三只猫.mp4"][0]["captions"]] == ["three cats"]
    failures = {row["uri"]: row for row in map(json.loads, (out / "failures.jsonl").read_text().splitlines())}
    assert set(failures) == {"sub/copy.mp4", "empty.mp4", "noise.webm"}
    funnel = {row["step"]: row for row in json.loads((out / "stats.json").read_text())["funnel"]}
    assert [funnel[step]["in"] for step in ("ingest", "probe", "shots", "transcode", "pack")] == [5, 5, 3, 3, 3]
    assert [funnel[step]["out"] for step in ("ingest", "probe", "shots", "transcode", "pack")] == [5, 3, 3, 3, 2]
    for row in funnel.values():
        assert row["in"] - row["out"] == sum(row["dropped"].values()), row
    dataset = json.loads((out / "dataset.json").read_text())
    assert dataset["totals"]["samples"] == 2 and dataset["histograms"]["frames"] == {"11": 1, "20": 1}
    shard = dataset["shards"][0]
    assert hashlib.sha256((out / shard["name"]).read_bytes()).hexdigest() == shard["sha256"]
    assert all(text in done.stdout for text in ("empty", "failures.jsonl", "2 clips"))


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda folder: None, "does not exist"),
        (lambda folder: folder.mkdir(), "holds no videos or images"),
        (lambda folder: (folder.mkdir(), (folder / "a.mp4").touch()), "a.mp4: the file is empty"),
        (lambda folder: (folder.mkdir(), [(folder / n).touch() for n in ("a.mp4", "b.mp4")]), "none of 2 files"),
    ],
)
def test_input_without_anything_usable_is_one_line_and_leaves_nothing(
    tmp_path: Path, made, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    made(tmp_path / "in")
    assert main([f"input={tmp_path / 'in'}", f"output={tmp_path / 'out'}", "workers=1"]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and said in lines[0] and "input=" in lines[0]
    assert not (tmp_path / "out").exists()


def start(folder: Path, name: str) -> subprocess.Popen[str]:
    """Start a build of `folder/videos` into `folder/<name>`."""
    command = [sys.executable, "-m", "data_prep", "input=videos", f"output={name}", "shards.mb=1", "workers=2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=folder, env=environment, **output)  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """Return a folder with videos and what an undisturbed run made of them, and the seconds that took."""
    folder = tmp_path_factory.mktemp("kills")
    (folder / "videos").mkdir()
    for number in range(30):
        write_clip(folder / "videos" / f"{number}.{'mkv' if number % 3 else 'mp4'}", 15 + number)
    (folder / "videos" / "empty.mp4").touch()
    began = time.monotonic()
    done = start(folder, "whole")
    assert done.wait(timeout=120) == 0, done.communicate()[0]
    return folder, time.monotonic() - began


@pytest.mark.full
def test_kills_at_any_moment_leave_a_command_that_ends_with_the_very_same_bytes(whole: tuple[Path, float]) -> None:
    folder, took = whole
    draws, kills = random.Random(0), 0
    for round in range(2):
        for place in range(6):
            process = start(folder, f"cut{round}")
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=took * (place + draws.random()) / 6)
            process.kill()
            kills += process.wait(timeout=60) == -signal.SIGKILL
        done = start(folder, f"cut{round}")
        assert done.wait(timeout=120) == 0, done.communicate()[0]
        assert (folder / f"cut{round}/report.html").is_file()
        assert digests(folder / f"cut{round}") == digests(folder / "whole")
    assert kills >= 6


@pytest.mark.full
def test_a_worker_that_is_killed_once_changes_nothing(whole: tuple[Path, float]) -> None:
    folder, _ = whole
    process = start(folder, "worker")
    while not list(folder.glob("worker/.building/units/*.json")):  # they are at work
        assert process.poll() is None
    found = psutil.Process(process.pid).children()
    workers = [child for child in found if any("spawn_main" in word for word in child.cmdline())]
    assert len(workers) == 2
    workers[-1].kill()
    assert process.wait(timeout=120) == 0, process.communicate()[0]
    assert digests(folder / "worker") == digests(folder / "whole")


@pytest.mark.full
@pytest.mark.parametrize("megabytes", [2, 3, 4])  # it is full while units are made, or while they are packed
def test_a_full_disk_is_one_line_and_the_same_command_goes_on_when_there_is_room(
    tmp_path: Path, small_disk: Path, megabytes: int
) -> None:
    argv = ["input=world", "world.clips=700", "workers=2", "shards.mb=1"]
    assert run(*argv, "output=whole", cwd=tmp_path).returncode == 0
    subprocess.run(["mount", "-o", f"remount,size={megabytes}m", str(small_disk)], check=True)
    done = run(*argv, "output=disk/w", cwd=tmp_path)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "No space left on device" in line and "the same command continues" in line
    assert not (small_disk / "w/dataset.json").exists()
    for path in small_disk.glob("w/.building/shards/*.tar"):  # those that are there are whole
        assert path.read_bytes() == (tmp_path / "whole" / path.name).read_bytes()
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    done = run(*argv, "output=disk/w", cwd=tmp_path)
    assert done.returncode == 0 and "continuing" in done.stdout, done.stderr
    assert digests(small_disk / "w") == digests(tmp_path / "whole")


def test_two_runs_at_once_do_not_spoil_each_other(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "data_prep", "input=world", "output=w", "world.clips=50", "workers=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    both = [subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE) for _ in range(2)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert Counter(process.returncode for process in both) in ({0: 2}, {0: 1, 2: 1}), said
    assert len(samples(tmp_path / "w")) == 50


def write_clip(path: Path, count: int) -> None:
    """Write a clip of a picture that gets brighter."""
    y, x = np.mgrid[0:48, 0:64]
    base = np.stack([60 + x, 60 + 2 * y, 120 - x], -1)
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx264", rate=10, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for index in range(count):
            pixels = (base + 3 * index).clip(0, 255).astype(np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        file.mux(stream.encode(None))
