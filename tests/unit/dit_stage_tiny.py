"""A stage with a DiT that is small enough for tests, batches for it, and its gradients."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from tiny_dit import VAE_FACTORY
from torch import Tensor

from soratrain.batch import LatentBatch, draw_of
from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.sampler import Sampler
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

TOKYO = 'A stylish woman walks down a Tokyo street, "neon" and signage (animated); she wears a black leather jacket.'


THREE = Sampler(steps=3, guidance_scale=2.0)


SIZES = {"dim": 16, "depth": 1, "num_heads": 2, "text_dim": 8}


DIT_FACTORY = partial(DiT, channels=4, **SIZES)


FLOW = Flow(shift=2.0)


DDPMS = [
    DDPM(shift=2.0),
    DDPM(prediction="x0", min_snr=5.0, snr_floor=1.0),
    DDPM(prediction="epsilon", schedule="linear", zero_terminal_snr=False),
]


TEXT_FACTORY = partial(ByteTextEncoder, dim=8, depth=1, num_heads=2, table=32, max_tokens=12)


def stage(objective: Objective = FLOW, **kwargs: object) -> DiTStage:
    module = DiTStage(
        dit=DIT_FACTORY,
        text=TEXT_FACTORY,
        objective=objective,
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(warmup_steps=0),
        max_steps=10,
        **kwargs,  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    module.configure_model()
    torch.nn.init.normal_(module.dit.head.weight, std=0.2)
    return module


def write_chain(folder: Path) -> None:
    """Write the weights of an untrained chain that draws more than zeros."""
    module = stage()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for name, (net, factory, extra) in module.exported().items():
        weights.save(folder / "weights", name, net, factory, extra)
    weights.save(folder / "weights", "vae", VAE_FACTORY(), VAE_FACTORY, {})


def batch(indices: list[int], total: int = 4) -> LatentBatch:
    """Return some of four samples, of which two have another shape than the others."""
    shapes = [(4, 2, 4, 4), (4, 2, 4, 4), (4, 1, 2, 6), (4, 3, 2, 4)]
    latents = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    return LatentBatch(
        keys=tuple(str(i) for i in indices),
        captions=tuple(f"a thing number {i}" for i in indices),
        fps=torch.tensor([8.0 + i for i in indices]),
        weights=torch.full((len(indices),), 1 / total),
        draws=torch.tensor([draw_of("sample", i) for i in indices]),
        scale=1.0,
        latents=tuple(latents[i] for i in indices),
    )


def gradients(module: DiTStage, parts: list[list[int]]) -> dict[str, Tensor]:
    module.zero_grad()
    for part in parts:
        module.training_step(batch(part), 0).backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
