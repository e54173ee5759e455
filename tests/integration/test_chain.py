"""The whole chain by the commands that people type, small and short: from nothing to clips, on the world and film."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import yaml
from PIL import Image

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"
SHORT = ["machine=laptop", "machine.steps.vae=6", "machine.steps.captioner=6", "machine.steps.dit=6"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "2"}


def call(folder: Path, *words: str, code: int = 0, module: str = "soratrain") -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == code, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder in which one command has made everything that sampling needs."""
    folder = tmp_path_factory.mktemp("world")
    made = call(folder, "stage=sample", *SHORT, "machine.world.clips=48", "sampler.steps=2")
    return folder, made


@pytest.mark.full
def test_sampling_from_nothing_makes_all_that_is_upstream(world):
    folder, made = world
    for stage in ("vae", "captioner", "recaption", "encode", "dit", "sample"):
        assert (folder / "outputs/default" / stage / "base/result.json").is_file(), made.stderr[-2000:]
    clips = sorted((folder / "outputs/default/sample/base/samples").glob("*.mp4"))
    assert len(clips) == 3
    with av.open(str(clips[0])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 9 and frames[0].shape == (48, 48, 3)


@pytest.mark.full
def test_a_finished_stage_is_not_run_again(world):
    folder, _ = world
    before = (folder / "outputs/default/dit/base/weights/dit.safetensors").stat().st_mtime_ns
    again = call(folder, "stage=dit", *SHORT, "machine.world.clips=48")
    assert "is done in" in again.stderr
    assert (folder / "outputs/default/dit/base/weights/dit.safetensors").stat().st_mtime_ns == before


@pytest.mark.full
def test_another_value_is_refused_and_the_folder_stays(world):
    folder, _ = world
    refused = call(folder, "stage=dit", *SHORT, "machine.world.clips=48", "optimizer.lr=0.5", code=2)
    assert "optimizer.lr" in refused.stderr and "fresh=true" in refused.stderr
    assert (folder / "outputs/default/dit/base/result.json").is_file()


@pytest.mark.full
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["size=50x48"], "size=50x48"),
        (["frames=8"], "frames=8"),
        (["prompt="], "prompt"),
        (["prompt=" + "very " * 3000 + "long"], "prompt"),
        (["size=big"], "WIDTHxHEIGHT"),
        (["inputs.dit=nowhere"], "inputs.dit=nowhere"),
    ],
)
def test_what_cannot_be_drawn_is_one_line_with_the_mend(world, words, said):
    folder, _ = world
    before = sorted(path.name for path in (folder / "outputs/default/sample/base/samples").iterdir())
    refused = call(folder, "stage=sample", *SHORT, "sampler.steps=2", *words, code=2)
    errors = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and said in errors[0] and "Traceback" not in refused.stderr
    assert sorted(path.name for path in (folder / "outputs/default/sample/base/samples").iterdir()) == before


@pytest.mark.full
def test_any_prompt_may_stand_on_the_command_line(world):
    folder, _ = world
    prompts = ['A woman says "hello", and walks (slowly) down a street, café', "三只猫", "a=b, c: {d}"]
    for prompt in prompts:
        call(folder, "stage=sample", *SHORT, "sampler.steps=1", "frames=1", f"prompt={prompt}")
    notes = [json.loads(file.read_text()) for file in (folder / "outputs/default/sample/base/samples").glob("*.json")]
    assert set(prompts) <= {note["prompt"] for note in notes}


@pytest.mark.full
def test_sizes_and_durations_that_were_never_trained_can_be_drawn(world):
    folder, _ = world
    call(folder, "stage=sample", *SHORT, "sampler.steps=1", "size=80x32", "frames=21", "prompt=a wide clip")
    (file,) = (folder / "outputs/default/sample/base/samples").glob("a-wide-clip-*.mp4")
    with av.open(str(file)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 21 and frames[0].shape == (32, 80, 3)


@pytest.mark.full
def test_a_sample_goes_into_every_other_way_to_sample(world):
    folder, _ = world
    samples = folder / "outputs/default/sample/base/samples"
    video = shutil.copy(sorted(samples.glob("a-red-circle*.mp4"))[0], folder / "a clip, café.mp4")
    with av.open(str(video)) as container:
        first = next(container.decode(video=0)).to_image()
    first.save(folder / "first.png")
    mask = np.zeros((48, 48), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    for words, frames in (
        (["animate", "task.image=first.png"], 9),
        (["extend", f"task.video={video}", "task.by=10"], 9 + 12),
        (["connect", f"task.video={video}", f"task.video2={video}", "task.by=7"], 9 + 7 + 9),
        (["inpaint", f"task.video={video}", "task.mask=mask.png", "strategy=ddp", "trainer.devices=2"], 9),
    ):
        before = set(samples.glob("*.mp4"))
        call(folder, "stage=sample", *SHORT, "sampler.steps=1", "prompt=it goes on", f"task={words[0]}", *words[1:])
        (made,) = set(samples.glob("*.mp4")) - before
        with av.open(str(made)) as container:
            assert len(list(container.decode(video=0))) == frames
    refused = call(folder, "stage=sample", *SHORT, "task=animate", "task.image=gone.png", code=2)
    assert "error: task.image=gone.png: does not exist" in refused.stderr


@pytest.mark.full
def test_the_recipe_and_a_sweep_run_from_the_same_upstream(world):
    folder, _ = world
    recipe = ("images_256", "video_256", "native_res", "video_720")
    call(folder, "stage=dit", "+experiment=video_720", *SHORT, *(f"machine.steps.{name}=2" for name in recipe))
    for before, name in pairwise((None, *recipe)):
        begun = yaml.safe_load((folder / f"outputs/default/dit/{name}/config.yaml").read_text())["init"]
        assert begun == (before and f"outputs/default/dit/{before}")
        assert (folder / f"outputs/default/dit/{name}/result.json").is_file()
    images = json.loads((folder / "outputs/default/encode/images_256/dataset.json").read_text())
    assert images["totals"]["clips"] == 48 and not yaml.safe_load(
        (folder / "outputs/default/encode/images_256/upstream.yaml").read_text()
    ).get("init")
    sweep = ["-m", "stage=dit", "optimizer.lr=1e-4,3e-4", *SHORT, "machine.world.clips=48"]
    call(folder, *sweep)
    jobs = sorted((folder / "outputs/default/dit/sweep").glob("*/result.json"))
    assert len(jobs) == 2
    call(folder, *[word.replace("3e-4", "3e-4,5e-4") for word in sweep])
    wider = sorted((folder / "outputs/default/dit/sweep").glob("*/result.json"))
    assert len(wider) == 3 and set(jobs) <= set(wider)


@pytest.mark.full
def test_ctrl_c_leaves_a_run_that_the_same_command_finishes_with_the_same_losses(world):
    folder, _ = world
    words = ["stage=vae", "run=stopped", "machine=laptop", "machine.steps.vae=40", "trainer.log_every=1"]
    whole = [word.replace("run=stopped", "run=whole") for word in words]
    call(folder, *whole)
    process = subprocess.Popen(
        [sys.executable, "-m", "soratrain", *words], cwd=folder, env=ENVIRONMENT, stderr=subprocess.DEVNULL
    )
    metrics = folder / "outputs/stopped/vae/base/metrics.csv"
    for _ in range(1200):
        if metrics.is_file() and len(metrics.read_text().splitlines()) > 5:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert not (folder / "outputs/stopped/vae/base/result.json").exists()
    call(folder, *words)
    assert losses(metrics) == losses(folder / "outputs/whole/vae/base/metrics.csv")


def losses(file: Path) -> list[tuple[str, str]]:
    """Return (step, loss) of every row."""
    rows = [line.split(",") for line in file.read_text().splitlines()]
    step, loss = rows[0].index("step"), rows[0].index("loss")
    return [(row[step], row[loss]) for row in rows[1:]]


@pytest.mark.full
def test_missing_upstream_is_named_where_it_may_not_be_made(tmp_path):
    refused = call(tmp_path, "stage=dit", "machine=laptop", "upstream=fail", code=2)
    assert "make it first: python -m soratrain stage=encode" in refused.stderr
    assert not (tmp_path / "outputs").exists()


@pytest.mark.full
@pytest.mark.media
def test_the_chain_runs_on_real_clips(tmp_path):
    if not MEDIA.is_dir():
        pytest.skip("the real clips in ../shared/media are not here")
    call(tmp_path, f"input={MEDIA}", "output=data/media", module="data_prep")
    failures = [json.loads(line) for line in (tmp_path / "data/media/failures.jsonl").read_text().splitlines()]
    assert any("corrupted.mp4" in str(failure) for failure in failures)
    run = ["run=media", "inputs.shards=data/media", *SHORT]
    for stage in ("vae", "captioner", "recaption", "encode", "dit"):
        call(tmp_path, f"stage={stage}", *run)
    call(tmp_path, "stage=sample", "prompt=a horse", "sampler.steps=2", *run)
    assert list((tmp_path / "outputs/media/sample/base/samples").glob("a-horse-*.mp4"))
