"""Promises of the samples that are drawn as training goes."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from data_tiny import write_latents
from PIL import Image
from safetensors.torch import load_file
from test_validation import same
from tiny_dit import PROMPTS, SHAPES, previews, train, write_vae

from soratrain.callbacks import loggers
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.distributed.phases import Phases
from soratrain.errors import ConfigError
from soratrain.models import tensor_file
from soratrain.stages.sample_files import slug


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("previews") / "latents", SHAPES)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_vae(tmp_path_factory.mktemp("vae")))


def drawn(monkeypatch: Any) -> list[list[np.ndarray]]:
    """Return the clips of each interval, as they will be drawn from now on."""
    found: list[list[np.ndarray]] = []
    generate = Generator.__call__

    def kept(self: Generator, *args: Any, **kwargs: Any) -> list[np.ndarray]:
        found.append(generate(self, *args, **kwargs))
        return found[-1]

    monkeypatch.setattr(Generator, "__call__", kept)
    return found


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_what_is_drawn_at_the_last_step_is_what_stage_sample_draws(
    latents: Path, vae: str, tmp_path: Path, monkeypatch: Any, precision: str
) -> None:
    found = drawn(monkeypatch)
    train(tmp_path, latents, vae=vae, precision=precision)
    monkeypatch.undo()
    generate = Generator.load(vae, tmp_path, precision=precision)
    size = {"height": 32, "width": 32, "frames": 5, "seed": 0}
    true = generate(PROMPTS, sampler=Sampler(steps=2, guidance_scale=2.0), **size)  # type: ignore[arg-type]
    assert len(found) == 2 and all(np.array_equal(a, b) for a, b in zip(found[1], true, strict=True))
    assert not np.array_equal(found[0][0], found[1][0])


def test_each_interval_leaves_a_clip_a_prompt_and_a_contact_sheet(latents: Path, vae: str, tmp_path: Path) -> None:
    train(tmp_path, latents, vae=vae, max_steps=3)
    names = [f"{step:08d}-{slug(prompt)}.mp4" for step in (2, 3) for prompt in PROMPTS]
    sheets = [f"{step:08d}.png" for step in (2, 3)]
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == sorted(names + sheets)
    with av.open(str(tmp_path / "samples" / names[0])) as container:
        assert len(list(container.decode(video=0))) == 5 and container.streams.video[0].average_rate == 8
    train(tmp_path / "images", latents, max_steps=1, previews=previews(vae, frames=1, every=5))
    assert sorted(path.suffix for path in (tmp_path / "images" / "samples").iterdir()) == [".png"] * 3
    with Image.open(tmp_path / "images" / "samples" / f"00000001-{slug(PROMPTS[0])}.png") as image:
        assert image.size == (32, 32)


def test_training_is_the_same_bit_for_bit_with_and_without_them(latents: Path, vae: str, tmp_path: Path) -> None:
    train(tmp_path / "with", latents, vae=vae, max_steps=5)
    train(tmp_path / "without", latents, max_steps=5)
    same(tmp_path / "with", tmp_path / "without")


def test_all_that_takes_long_says_how_far_it_has_come(
    latents: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[str] = []
    move = Phases.move

    def kept(self: Phases, *, alike: bool = True) -> None:
        found.append(self.standing().phase)
        move(self, alike=alike)

    monkeypatch.setattr(Phases, "move", kept)
    monkeypatch.setattr(tensor_file, "CHUNK", 1000)
    train(tmp_path, latents, max_steps=1, checkpoint_async=False, previews=previews(vae, every=1, batch=1))
    exported = sum(len(load_file(file)) for file in (tmp_path / "weights").glob("*.safetensors"))
    size = (tmp_path / "checkpoints" / "step-00000001" / "rank-00000.safetensors").stat().st_size
    counts = Counter(found)
    assert counts["samples"] == len(PROMPTS) and counts["export"] == exported > 20
    assert counts["checkpoint"] >= size // 1000 > 20
    assert counts["validation"] >= 3 * 4  # four clips are read, and asked of both weights
    assert sum(counts.values()) == sum(counts[name] for name in ("samples", "export", "checkpoint", "validation"))


def test_a_run_that_could_draw_nothing_ends_before_it_begins(latents: Path, vae: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no samples can be drawn: .*validation.sample_every=0 does without"):
        train(tmp_path / "none", latents, vae=str(tmp_path / "nowhere"))
    other = str(write_vae(tmp_path / "other", latent_channels=8))
    with pytest.raises(ConfigError, match="is not the VAE that the latents were made with"):
        train(tmp_path / "wrong", latents, vae=other)
    assert not (tmp_path / "none" / "metrics.csv").exists() and not (tmp_path / "wrong" / "metrics.csv").exists()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"every": -1}, "validation.sample_every=-1"),
        ({"size": "33x32"}, "validation.size, validation.frames: size=33x32"),
        ({"size": "large"}, "validation.size"),
        ({"frames": 4}, "frames=4"),
        ({"prompts": [" "]}, "validation.prompts: prompt is empty"),
        ({"fps": 0.0}, "validation.fps: fps=0 must lie"),
    ],
)
def test_bad_values_are_refused_before_anything_is_built(
    latents: Path, vae: str, tmp_path: Path, wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        train(tmp_path, latents, previews=previews(vae, **wrong))


@pytest.mark.full
def test_wandb_gets_the_table_its_picture_and_the_clips(
    latents: Path, vae: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    pytest.importorskip("wandb").finish()  # another test's run, if it is still open
    train(tmp_path, latents, vae=vae, logger=partial(loggers.wandb, project="test"))
    media = next(tmp_path.glob("wandb/offline-run-*/files/media"))
    kinds = sorted(path.suffix for path in media.rglob("*") if path.is_file())
    assert kinds == [".json"] * 2 + [".mp4"] * 4 + [".png"] * 4
    tables = [json.loads(path.read_text()) for path in media.rglob("*.json")]
    assert all(table["columns"] == ["step", "weights", "level", "size", "frames", "loss", "clips"] for table in tables)
