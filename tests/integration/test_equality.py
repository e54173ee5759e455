"""One step is the same step however it is spread: losses and every gradient, on packs of images and clips, in fp32."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from ranks import run_ranks
from tiny_training import SGDFactory

from soratrain.data.datamodule import LatentData
from soratrain.diffusion.conditioning import MODES, Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import Schedule
from soratrain.stages.dit import DiTStage

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

STEPS, BOUND = 5, 1e-5
SHAPES = [(48, 48, 9), (32, 32, 1), (32, 48, 5), (64, 32, 13), (48, 32, 1), (16, 16, 1)] * 6  # height, width, frames
WAYS = {  # name: strategy, ranks, of which share their tokens
    "ddp-2": ("ddp", 2, 1),
    "zero1-2": ("zero1", 2, 1),
    "zero2-2": ("zero2", 2, 1),
    "zero3-2": ("zero3", 2, 1),
    "sequence-2": ("ddp", 2, 2),
    "sequence-2, zero1": ("zero1", 2, 2),
    "sequence-2, zero2": ("zero2", 2, 2),
    "sequence-2, zero3": ("zero3", 2, 2),
    "2 x sequence-2, zero2": ("zero2", 4, 2),
    "2 x sequence-2, zero3": ("zero3", 4, 2),
    "sequence-4": ("ddp", 4, 4),
    "sequence-4, zero3": ("zero3", 4, 4),
}
QUICK = "sequence-2, zero2"


def factories(**options: Any) -> dict[str, partial]:
    """Return the factory of each net."""
    return {
        "dit": partial(DiT, channels=4, dim=32, depth=2, num_heads=4, text_dim=8, **options),
        "text": partial(ByteTextEncoder, dim=8, depth=1, num_heads=2, table=32, max_tokens=12),
    }


def write_weights(folder: Path) -> Path:
    """Write nets of which nothing begins at zero, so that no gradient is zero for want of another weight."""
    torch.manual_seed(1)
    for name, factory in factories().items():
        state = factory().state_dict()
        noised = {key: value + 0.15 * torch.randn_like(value) for key, value in state.items()}
        weights.save(folder, name, noised, factory, {})
    return folder


class Gradients(L.Callback):
    """Keeps every gradient of each step as the optimizer is about to see it, before it is clipped."""

    def __init__(self) -> None:
        self.steps: list[dict[str, np.ndarray]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        engine = trainer.model  # DeepSpeed's, under ZeRO, with every micro-batch
        if not getattr(engine, "is_gradient_accumulation_boundary", lambda: True)():
            return
        whole = self.gathered if hasattr(engine, "zero_optimization") else (lambda parameter: parameter.grad)
        found = {name: whole(parameter) for name, parameter in pl_module.named_parameters()}
        self.steps.append({name: gradient.detach().cpu().numpy().copy() for name, gradient in found.items()})

    def gathered(self, parameter: torch.Tensor) -> torch.Tensor:
        from deepspeed.utils import safe_get_full_grad

        return safe_get_full_grad(parameter)


def run(
    out: str, latents: str, begin: str, strategy: str, ranks: int, sequence: int, **options: Any
) -> list[dict[str, np.ndarray]]:
    """Train; return the gradients of each step."""
    L.seed_everything(1, verbose=False)
    stage = DiTStage(
        **factories(**options),
        objective=Flow(),
        optimizer=SGDFactory(lr=0.1),
        schedule=Schedule(warmup_steps=0),
        max_steps=STEPS,
        conditioning=Conditioning(mix=dict.fromkeys(MODES, 0.14), tail_frames=[1]),
    )
    for name in factories():
        stage.start_from(name, begin)
    data = LatentData(
        latents=latents, tails=[1], seed=3, max_steps=STEPS, batching="pack", tokens_per_batch=80, canonical_ranks=2
    )
    kept = Gradients()
    trainer = build_trainer(
        out=out,
        max_steps=STEPS,
        strategy=StrategyOptions(name=strategy),
        accelerator="cpu",
        devices=ranks,
        sequence=sequence,
        clip=0.5,
        ema=0.9,
        log_every=1,
        callbacks=[kept],
    )
    fit(trainer, stage, data)
    return kept.steps


def differences(out: Path, one: Path, gradients: list[Any], expected: list[Any]) -> tuple[float, float, str]:
    """Return the largest difference of a loss, of a gradient as a share of its parameter's largest, and of which."""
    from test_strategies import steps

    rows = zip(steps(out), steps(one), strict=True)
    loss = max(abs(row["loss"] - other["loss"]) / other["loss"] for row, other in rows)
    worst, whose = 0.0, ""
    for step, (found, wanted) in enumerate(zip(gradients, expected, strict=True), start=1):
        assert found.keys() == wanted.keys()
        for name, gradient in wanted.items():
            assert np.abs(gradient).max() > 0, f"{name} has no gradient at step {step}"
            share = np.abs(found[name] - gradient).max() / np.abs(gradient).max()
            if share > worst:
                worst, whose = float(share), f"{name}, step {step}"
    return loss, worst, whose


def write_noise(folder: Path) -> Path:
    """Write latents of noise, and a tail of each."""
    import safetensors.torch
    from data_tiny import fields, write

    random, samples = torch.Generator().manual_seed(2), []
    for height, width, frames in SHAPES:
        shape = (4, 1 + (frames - 1) // 4, height // 8, width // 8)
        latent, tail = (torch.randn(*size, generator=random) for size in (shape, (4, 1, *shape[2:])))
        media = safetensors.torch.save({"latent": latent.bfloat16(), "tail1": tail.bfloat16()})
        samples.append((fields(height, width, frames, "safetensors"), media))
    write(folder, samples)
    return folder


def compared(tmp_path: Path, names: list[str], **options: Any) -> list[tuple[str, float, float, str]]:
    """Return, for each way, how far it is from a single process."""
    latents = str(write_noise(tmp_path / "latents"))
    common = {"latents": latents, "begin": str(write_weights(tmp_path / "begin")), **options}
    (expected,) = run_ranks(run, 1, out=str(tmp_path / "single"), strategy="single", ranks=1, sequence=1, **common)
    found = []
    for name in names:
        strategy, ranks, sequence = WAYS[name]
        settings = {"strategy": strategy, "ranks": ranks, "sequence": sequence, **common}
        every = run_ranks(run, ranks, out=str(tmp_path / name), **settings)
        for gradients in every:
            found.append((name, *differences(tmp_path / name, tmp_path / "single", gradients, expected)))
        same_counts(tmp_path / name, tmp_path / "single")
    return found


def same_counts(out: Path, one: Path) -> None:
    """Compare what is counted, and the norm by which gradients were clipped, with the single process's."""
    from test_strategies import steps

    for row, other in zip(steps(out), steps(one), strict=True):
        assert [row[key] for key in ("tokens", "samples")] == [other[key] for key in ("tokens", "samples")]
        assert other.pop("padding") == 0 <= row.pop("padding") < 0.03  # what shared tokens are filled up with
        assert row == pytest.approx(other, rel=1e-4)


def test_shared_tokens_give_the_step_of_a_single_process(tmp_path: Path) -> None:
    for name, loss, gradient, whose in compared(tmp_path, [QUICK]):
        assert loss <= BOUND and gradient <= BOUND, f"{name}: loss {loss:.1e}, gradient {gradient:.1e} ({whose})"


@pytest.mark.full
def test_five_steps_are_the_same_however_they_are_spread(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = compared(tmp_path, list(WAYS))
    worst = {name: max(row for row in rows if row[0] == name) for name in WAYS}
    lines = [f"{'against a single process':<26}{'loss':>10}{'gradient':>10}  where"]
    lines += [f"{name:<26}{loss:>10.1e}{share:>10.1e}  {whose}" for name, loss, share, whose in worst.values()]
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    assert max(row[1] for row in rows) <= BOUND and max(row[2] for row in rows) <= BOUND


@pytest.mark.full
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_is_exchanged_again(recompute: str, tmp_path: Path) -> None:
    for name, loss, gradient, whose in compared(tmp_path, ["2 x sequence-2, zero3"], recompute=recompute):
        assert loss <= BOUND and gradient <= BOUND, f"{name}: loss {loss:.1e}, gradient {gradient:.1e} ({whose})"
