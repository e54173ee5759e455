"""The loader under the trainer that stages are run with: own checkpoints, graceful stops."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from data_tiny import write_latents
from torch import nn

from soratrain.batch import LatentBatch
from soratrain.data.datamodule import LatentData
from soratrain.distributed.trainer import StoppedError, build_trainer, fit
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

SHAPES = [(32, 32, 9)] * 9 + [(32, 48, 9)] * 5 + [(32, 32, 1)] * 6


class Stage(TrainStage):
    """Fits keyed noise to each latent's mean, and remembers what it saw in each step."""

    def __init__(self, **options: Any) -> None:
        super().__init__(nets={"net": partial(nn.Linear, 1, 1)}, **options)
        self.seen: list[tuple[int, tuple[str, ...], tuple[int, ...]]] = []
        self.end: list[tuple[str, ...]] = []

    def training_step(self, batch: LatentBatch, batch_idx: int) -> torch.Tensor:
        self.seen.append((self.global_step, batch.keys, tuple(batch.draws.tolist())))
        x = torch.stack([latent.mean() / 20 for latent in batch.latents])[:, None]
        target = torch.cat(batch.normal("noise", [(1,)] * len(batch)))
        loss = batch.mean((self.net(x)[:, 0] - target) ** 2)
        self.report(loss=loss, samples=len(batch))
        return loss

    def finalize(self) -> None:
        self.end = [batch.keys for batch in self.trainer.datamodule.train_dataloader()]


class StopAt(L.Callback):
    """Tells the trainer to stop after a step, as its own handler of signals does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            stop = next(item for item in trainer.callbacks if type(item).__name__ == "GracefulStop")
            stop.received = 15


def train(latents: str, out: Path, *, accumulate_blocks: int = 2, stop: int | None = None, steps: int = 7) -> Stage:
    data = LatentData(latents=latents, seed=3, max_steps=steps, batch_size=2, accumulate_blocks=accumulate_blocks)
    stage = Stage(optimizer=OptimizerFactory(lr=0.05), schedule=Schedule(name="constant"), max_steps=steps)
    trainer = build_trainer(
        out=out,
        max_steps=steps,
        accelerator="cpu",
        accumulate=data.accumulation(1),
        checkpoint_every=2,
        callbacks=[StopAt(stop)] if stop else [],
    )
    try:
        fit(trainer, stage, data)
    except StoppedError:
        assert stop
    return stage


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_latents(tmp_path_factory.mktemp("latents"), SHAPES))


@pytest.mark.parametrize("stop", [2, 5])
def test_the_same_call_again_goes_on_bit_for_bit(latents: str, tmp_path: Path, stop: int) -> None:
    whole = train(latents, tmp_path / "whole")
    first = train(latents, tmp_path / "broken", stop=stop)
    second = train(latents, tmp_path / "broken")
    assert first.seen + second.seen == whole.seen and first.seen and second.seen
    names = [(tmp_path / run / "weights" / "net.safetensors").read_bytes() for run in ("whole", "broken")]
    assert names[0] == names[1]
    assert whole.end == second.end and len(whole.end) == 14
