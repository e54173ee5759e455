"""Promises of latents made live: what stage=encode would store, from a VAE that training does not touch."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from dit_stage_tiny import DIT_FACTORY, TEXT_FACTORY
from test_dit_segments import EVEN, Kill, conditioned
from test_encode import FACTORY, write_shards

from soratrain.batch import LatentBatch, VideoBatch
from soratrain.data.buckets import Native
from soratrain.data.datamodule import LatentData, VideoData
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.distributed.checkpoint import latest_checkpoint, read_state
from soratrain.distributed.fit import fit
from soratrain.distributed.trainer import build_trainer
from soratrain.errors import ConfigError
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage
from soratrain.stages.encode import Encode
from soratrain.stages.live import LiveEncoder

STEPS = 6
TRIMMED = "clip 1"  # has 7 frames, of which a live clip takes any 5


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, a VAE, and the latents that it makes of them."""
    folder = tmp_path_factory.mktemp("live")
    write_shards(folder / "shards")
    torch.manual_seed(0)
    vae = FACTORY()
    vae.set_statistics(torch.linspace(-1, 1, 4), 0.5 * torch.eye(4) + 0.1)
    weights.save(folder / "vae", "vae", vae, FACTORY, {})
    Encode(
        out=str(folder / "latents"),
        shards=str(folder / "shards"),
        vae=str(folder / "vae"),
        buckets=Native(),
        tail_frames=[1, 5],
        dtype="fp16",
    )()
    return folder


def clips(place: Path, **options: object) -> VideoData:
    common = {"shards": str(place / "shards"), "buckets": Native(), "seed": 0, "max_steps": STEPS, "batch_size": 1}
    return VideoData(**(common | options))  # type: ignore[arg-type]


def build(place: Path, conditioning: Conditioning, **options: object) -> DiTStage:
    common = dict(dit=DIT_FACTORY, text=TEXT_FACTORY, objective=Flow(), optimizer=OptimizerFactory(lr=1e-2))
    common |= {"schedule": Schedule(warmup_steps=0), "max_steps": STEPS, "conditioning": conditioning}
    return DiTStage(**(common | {"vae": str(place / "vae")} | options))  # type: ignore[arg-type]


def pairs(place: Path) -> list[tuple[VideoBatch, LatentBatch]]:
    """Return each clip as pixels and as stored latents, with the same draw."""
    latents = LatentData(latents=str(place / "latents"), seed=0, max_steps=STEPS, batch_size=1, tails=[1, 5])
    stored = {given.keys: given for given in map(latents.items().__getitem__, range(4 * STEPS))}
    live = {given.keys: given for given in map(clips(place).items().__getitem__, range(4 * STEPS))}
    found = []
    for keys, video in live.items():
        if keys in stored and video.captions != (TRIMMED,):
            held = stored[keys]
            common = {name: getattr(video, name) for name in vars(video) if name != "video"}
            found.append((video, LatentBatch(latents=held.latents, tails=held.tails, **common)))
    assert len(found) == 5
    return found


@pytest.mark.parametrize("pixels_per_batch", [1 << 22, 2000])  # whole, and in pieces and tiles
def test_live_latents_and_their_ends_are_what_encode_stores(place: Path, pixels_per_batch: int) -> None:
    encoder = LiveEncoder(str(place / "vae"), pixels_per_batch)
    encoder.load(4)
    for video, stored in pairs(place):
        made = encoder(video, [5, 1, 9])
        assert made.captions == video.captions and torch.equal(made.weights, video.weights)
        torch.testing.assert_close(made.latents[0], stored.latents[0], atol=1e-2, rtol=1e-2)
        frames = video.video.shape[1]
        assert sorted(made.tails[0]) == [count for count in (1, 5, 9) if count <= frames]
        assert sorted(stored.tails[0]) == [count for count in (1, 5) if count <= frames]
        for count, end in stored.tails[0].items():
            torch.testing.assert_close(made.tails[0][count], end, atol=1e-2, rtol=1e-2)
        assert not made.latents[0].requires_grad
        with pytest.raises(KeyError):
            made.tails[0][13]


@pytest.mark.parametrize("mode", ["t2v", "suffix", "connect", "inpaint", "all"])
def test_the_loss_of_a_clip_is_that_of_its_cached_latent(place: Path, mode: str) -> None:
    module = build(place, conditioned(EVEN if mode == "all" else {} if mode == "t2v" else {mode: 1.0}))
    module.configure_model()
    torch.nn.init.normal_(module.dit.head.weight, std=0.2)
    for video, stored in pairs(place):
        live = module.training_step(video, 0)
        torch.testing.assert_close(live, module.training_step(stored, 0), atol=2e-3, rtol=2e-2)
        live.backward()
    assert all(parameter.grad is not None for parameter in module.parameters())


def test_the_vae_is_none_of_the_nets_that_are_trained_saved_or_exported(place: Path) -> None:
    module = build(place, Conditioning())
    module.configure_model()
    assert {name.split(".")[0] for name, _ in module.named_parameters()} == {"dit", "text"}
    assert {name.split(".")[0] for name in module.state_dict()} == {"dit", "text"}
    assert set(module.exported()) == {"dit", "text"} and set(module.factories) == {"dit", "text"}
    kept = module.live
    assert kept is not None
    before = {name: value.clone() for name, value in kept._vae.state_dict().items()}
    module.configure_model()  # Lightning may call it again
    assert all(not value.requires_grad for value in kept._vae.parameters()) and not kept._vae.training
    assert all(torch.equal(value, before[name]) for name, value in kept._vae.state_dict().items())


def train(out: Path, place: Path, kill: int = -1) -> list[dict[str, str]]:
    L.seed_everything(0, verbose=False)
    trainer = build_trainer(
        out=out, max_steps=STEPS, accelerator="cpu", ema=0.9, log_every=1, checkpoint_every=2, callbacks=[Kill(kill)]
    )
    fit(trainer, build(place, conditioned(EVEN, ramp=0.5)), clips(place, strides=[1, 2]))
    with (out / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_run_on_live_latents_goes_on_as_the_unbroken_one(place: Path, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", place)
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "broken", place, kill=3)
    again = train(tmp_path / "broken", place)
    assert len(whole) == STEPS
    assert [(row["loss"], row["grad_norm"]) for row in again] == [(row["loss"], row["grad_norm"]) for row in whole]
    checkpoint = latest_checkpoint(tmp_path / "whole" / "checkpoints")
    assert {name.split(".")[0] for name in read_state(checkpoint)["shapes"]} == {"dit", "text"}
    assert sorted(file.stem for file in (tmp_path / "whole" / "weights").glob("*.safetensors")) == ["dit", "text"]


def test_a_vae_that_the_dit_does_not_fit_is_refused_before_training(place: Path, tmp_path: Path) -> None:
    wide = build(place, Conditioning(), dit=partial(DiT, **{**DIT_FACTORY.keywords, "channels": 8}))
    with pytest.raises(ConfigError, match="makes latents of 4 channels, and the DiT takes 8; set dit.channels=4"):
        wide.configure_model()
    slow = partial(VAE, **{**FACTORY.keywords, "time_strides": [1]})
    weights.save(tmp_path, "vae", slow(), slow, {})
    with pytest.raises(ConfigError, match="stride of 2 in time, and the DiT counts 4"):
        build(tmp_path, Conditioning(), vae=str(tmp_path)).configure_model()
    with pytest.raises(ConfigError, match="pixels_per_batch=0"):
        build(place, Conditioning(), pixels_per_batch=0)
