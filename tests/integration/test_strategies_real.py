"""The real stages, at a tiny size, train the same numbers under every strategy."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from test_strategies import same_training, steps
from tiny_training import SGDFactory, Spy
from torch.utils.data import DataLoader, IterableDataset

from soratrain.batch import Batch, LatentBatch, VideoBatch, draw_of
from soratrain.diffusion.conditioning import MODES, Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.models import weights
from soratrain.models.captioner import Captioner
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import FrozenText
from soratrain.models.text import ByteTextEncoder
from soratrain.models.vae import VAE
from soratrain.models.vlm import VLM
from soratrain.optim import Schedule
from soratrain.stages.base import TrainStage
from soratrain.stages.captioner import CaptionerStage
from soratrain.stages.dit import DiTStage
from soratrain.stages.vae import VAEStage

STEPS, MICRO, SAMPLES = 2, 4, 2
STAGES = ("vae", "captioner", "dit", "segments", "frozen")
WORDS = ("a red circle", "two blue squares that bounce, then rest", "grün", "")


def batch(stage: str, index: int) -> Batch:
    """Return micro-batch `index`: sizes and durations differ from one to the next, as buckets do."""
    random = torch.Generator().manual_seed(index)
    keys = tuple(f"{index}-{place}" for place in range(SAMPLES))
    common: dict[str, Any] = {
        "keys": keys,
        "captions": tuple(WORDS[(index + place) % len(WORDS)] for place in range(SAMPLES)),
        "fps": torch.full((SAMPLES,), 8.0),
        "weights": torch.full((SAMPLES,), 1 / (MICRO * SAMPLES)),
        "draws": torch.tensor([draw_of(0, key) for key in keys]),
        "scale": float(MICRO),
    }
    frames, height = 1 + 4 * (index % 2), 32 + 16 * (index % 3 == 0)
    if stage in ("dit", "segments", "frozen"):
        shape = (4, 1 + index % 2, height // 8, 4)
        latents = tuple(torch.randn(shape, generator=random) for _ in range(SAMPLES))
        tails = tuple({1: torch.randn((4, 1, *shape[2:]), generator=random)} for _ in range(SAMPLES))
        return LatentBatch(latents=latents, tails=tails if stage == "segments" else (), **common)
    video = torch.randint(0, 256, (SAMPLES, frames, height, 32, 3), dtype=torch.uint8, generator=random)
    return VideoBatch(video=video, **common)


class Micro(IterableDataset):
    def __init__(self, stage: str, rank: int, ranks: int) -> None:
        self.stage, self.rank, self.ranks = stage, rank, ranks

    def __iter__(self) -> Iterator[Batch]:
        for index in range(self.rank, STEPS * MICRO, self.ranks):
            yield batch(self.stage, index)


class Data(L.LightningDataModule):
    def __init__(self, stage: str) -> None:
        super().__init__()
        self.stage = stage

    def train_dataloader(self) -> DataLoader:
        return DataLoader(Micro(self.stage, self.trainer.global_rank, self.trainer.world_size), batch_size=None)

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        return batch.to(device)


def build(stage: str, encoder: str, recompute: str) -> TrainStage:
    common: dict[str, Any] = {
        "optimizer": SGDFactory(lr=0.05),
        "schedule": Schedule(name="constant", warmup_steps=0),
        "max_steps": STEPS,
    }
    text = partial(ByteTextEncoder, dim=8, depth=1, num_heads=2, table=32, max_tokens=24)
    if stage == "vae":
        layout = {"channels": [8, 8], "time_strides": [2], "space_strides": [2], "front_strides": [2, 4]}
        blocks = {"encoder_blocks": [0, 1], "decoder_blocks": [0, 1], "time_kernels": [1, 3]}
        return VAEStage(net=partial(VAE, latent_channels=4, **layout, **blocks), **common)
    if stage == "captioner":
        width = {"dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
        return CaptionerStage(
            net=partial(Captioner, **width, table=64, vector_dim=8, styles=["short"]), text=text, **common
        )
    if stage == "vlm":  # adapters in the encoder, a language model trained whole
        sizes = {"dim": 16, "depth": 1, "num_heads": 2, "queries": 3, "patches": 4, "max_tokens": 24, "vector_dim": 8}
        tuned = {"vision_tuning": "lora", "language_tuning": "full", "lora_rank": 2}
        parts = {"vision": f"{encoder}/eye", "language": f"{encoder}/tongue"}
        return CaptionerStage(net=partial(VLM, **parts, **sizes, **tuned), text=text, **common)
    if stage == "frozen":
        text = partial(FrozenText, folder=encoder, dim=8)
    dit = partial(DiT, channels=4, dim=16, depth=2, num_heads=2, text_dim=8, recompute=recompute)
    mix = dict.fromkeys(MODES, 0.19) if stage == "segments" else {}
    conditioning = Conditioning(mix=mix, tail_frames=[1], ramp=0.5, known_noise=0.1)
    return DiTStage(dit=dit, text=text, objective=Flow(), conditioning=conditioning, **common)


def run(
    out: str, stage: str, strategy: str, ranks: int, weights: str = "fp32", half: bool = False, recompute: str = "none"
) -> None:
    L.seed_everything(1, verbose=False)
    trainer = build_trainer(
        out=out,
        max_steps=STEPS,
        strategy=StrategyOptions(name=strategy, weights=weights),
        precision="bf16-mixed" if half else "32-true",
        accelerator="cpu",
        devices=ranks,
        accumulate=MICRO // ranks,
        clip=1.0,
        ema=0.9,
        log_every=1,
        callbacks=[Spy(Path(out) / "whole.pt")],
    )
    fit(trainer, build(stage, str(Path(out).parent / "encoder"), recompute), Data(stage))


def save_encoder(stage: str, folder: Path) -> None:
    sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
    if stage == "frozen":
        import hf_tiny

        hf_tiny.save("t5", folder / "encoder", dim=8)
    if stage == "vlm":
        import vlm_parts_tiny

        vlm_parts_tiny.save_encoder(folder / "encoder" / "eye")
        vlm_parts_tiny.save_language(folder / "encoder" / "tongue", "qwen2")


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3", "zero2_offload", "zero3_offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_each_real_stage_trains_alike_under_every_strategy(stage: str, strategy: str, tmp_path: Path) -> None:
    save_encoder(stage, tmp_path)
    run_ranks(run, 1, out=str(tmp_path / "one"), stage=stage, strategy="single", ranks=1)
    run_ranks(run, 2, out=str(tmp_path / "two"), stage=stage, strategy=strategy, ranks=2)
    same_training(tmp_path / "one", tmp_path / "two")


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_a_captioner_of_others_nets_trains_alike_under_every_strategy(strategy: str, tmp_path: Path) -> None:
    save_encoder("vlm", tmp_path)
    run_ranks(run, 1, out=str(tmp_path / "one"), stage="vlm", strategy="single", ranks=1)
    run_ranks(run, 2, out=str(tmp_path / "two"), stage="vlm", strategy=strategy, ranks=2)
    same_training(tmp_path / "one", tmp_path / "two")
    (one, _), (two, _) = (weights.load(tmp_path / run, "captioner") for run in ("one", "two"))
    assert one.known_styles == two.known_styles == ("short",)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["zero2", "zero3_offload"])
@pytest.mark.parametrize("stage", STAGES)
def test_each_real_stage_trains_with_weights_in_bf16(stage: str, strategy: str, tmp_path: Path) -> None:
    save_encoder(stage, tmp_path)
    run_ranks(run, 1, out=str(tmp_path / "one"), stage=stage, strategy="single", ranks=1, half=True)
    run_ranks(run, 2, out=str(tmp_path / "two"), stage=stage, strategy=strategy, ranks=2, half=True, weights="bf16")
    first, second = steps(tmp_path / "one"), steps(tmp_path / "two")
    assert len(first) == len(second) == STEPS
    for one, other in zip(first, second, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=0.05)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.1)


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["selective", "full"])
@pytest.mark.parametrize("strategy", ["zero2_offload", "zero3_offload"])
def test_what_is_computed_again_changes_nothing_under_offload(recompute: str, strategy: str, tmp_path: Path) -> None:
    settings = {"stage": "dit", "strategy": strategy, "ranks": 2}
    run_ranks(run, 2, out=str(tmp_path / "one"), **settings)
    run_ranks(run, 2, out=str(tmp_path / "two"), recompute=recompute, **settings)
    same_training(tmp_path / "one", tmp_path / "two")
