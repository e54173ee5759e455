"""A DiT small enough to train in a blink, on tiny latents, with everything that watches it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch

from soratrain.callbacks.previews import Previews
from soratrain.callbacks.validation import Validation
from soratrain.data.datamodule import LatentData
from soratrain.data.held_out import HeldOut
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.sampler import Sampler
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.text import ByteTextEncoder
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

SHAPES = [(32, 32, 9)] * 16 + [(32, 48, 5)] * 14 + [(32, 32, 1)] * 12
FLOW = Flow(shift=2.0, prediction="balanced")
PROMPTS = ["a red circle", "a blue square, moving"]
VAE_FACTORY = partial(
    VAE,
    latent_channels=4,
    channels=[8, 8],
    time_strides=[2],
    space_strides=[2],
    encoder_blocks=[0, 0],
    decoder_blocks=[0, 0],
    time_kernels=[1, 1],
    front_strides=[2, 4],
)


def write_vae(folder: Path, **other: Any) -> Path:
    """Write an untrained VAE of the latents' channels."""
    torch.manual_seed(5)
    factory = partial(VAE_FACTORY, **other)
    weights.save(folder, "vae", factory().state_dict(), factory, {})
    return folder


def previews(vae: str | Path, *, every: int = 2, **other: Any) -> partial:
    """Return what build_trainer takes to draw samples."""
    sampler = Sampler(steps=2, guidance_scale=2.0)
    usual = {"size": "32x32", "frames": 5, "fps": 8.0, "seed": 0, "prompts": PROMPTS}
    return partial(Previews, every=every, sampler=sampler, vae=str(vae), **usual | other)


def train(
    out: str | Path,
    latents: str | Path,
    *,
    strategy: str = "single",
    ranks: int = 1,
    clips: int = 4,
    every: int = 2,
    levels: int = 10,
    max_steps: int = 4,
    stop_at: int = 0,
    ema: float = 0.5,
    objective: Objective = FLOW,
    vae: str | None = None,
    beside: str | None = None,
    net: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    conditioning: Conditioning | None = None,
    optimizer: OptimizerFactory | None = None,
    **trainer: Any,
) -> tuple[L.Trainer, DiTStage, dict[str, float]]:
    """Train; return trainer, stage and last row of metrics. `stop_at` ends early, as a kill would.

    `net` and `data` are further options of the DiT and of the data.
    """
    L.seed_everything(1, verbose=False)
    stage = DiTStage(
        dit=partial(DiT, **{"channels": 4, "dim": 16, "depth": 1, "num_heads": 2, "text_dim": 8} | dict(net or {})),
        text=partial(ByteTextEncoder, dim=8, depth=1, num_heads=2, table=32, max_tokens=12),
        objective=objective,
        optimizer=optimizer or OptimizerFactory(lr=1e-2),
        conditioning=conditioning,
        schedule=Schedule(warmup_steps=0),
        max_steps=max_steps,
    )
    usual: dict[str, Any] = {"batch_size": 2, "canonical_ranks": 2, "held_out": HeldOut(clips=clips, latents=beside)}
    module = LatentData(latents=str(latents), seed=3, max_steps=max_steps, **usual | dict(data or {}))
    built = build_trainer(
        out=out,
        max_steps=stop_at or max_steps,
        strategy=StrategyOptions(name=strategy),
        accelerator="cpu",
        devices=ranks,
        ema=ema,
        validation=partial(Validation, every=every, levels=levels),
        **{"checkpoint_every": 1, "log_every": 1, "previews": previews(vae) if vae else None} | trainer,  # type: ignore[arg-type]
    )
    return built, stage, fit(built, stage, module)
