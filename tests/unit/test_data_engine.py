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
from soratrain.data.planned import PlannedData
from soratrain.distributed.fit import StoppedError, fit
from soratrain.distributed.trainer import build_trainer
from soratrain.errors import ConfigError
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


def train(latents: str, out: Path, *, stop: int | None = None, steps: int = 7, **options: Any) -> Stage:
    options = {"seed": 3, "batch_size": 2, "accumulate_blocks": 2} | options
    data = LatentData(latents=latents, max_steps=steps, **options)
    stage = Stage(optimizer=OptimizerFactory(lr=0.05), schedule=Schedule(name="constant"), max_steps=steps)
    trainer = build_trainer(
        out=out,
        max_steps=steps,
        accelerator="cpu",
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


def test_a_run_that_two_ranks_began_is_continued_by_one(latents: str, tmp_path: Path, monkeypatch: Any) -> None:
    whole = train(latents, tmp_path / "whole", canonical_ranks=2)
    with monkeypatch.context() as patch:  # one process that takes itself for the first of two
        patch.setattr(PlannedData, "_world", lambda data: (0, 2))
        accumulation = PlannedData.accumulation
        patch.setattr(PlannedData, "accumulation", lambda data, ranks: accumulation(data, 2))
        train(latents, tmp_path / "broken", stop=4)
    second = train(latents, tmp_path / "broken")
    assert second.seen == [item for item in whole.seen if item[0] >= 4]


@pytest.mark.parametrize("change", [{"seed": 4}, {"batch_size": 3}, {"accumulate_blocks": 1}, {"canonical_ranks": 2}])
def test_a_checkpoint_of_another_plan_is_refused(latents: str, tmp_path: Path, change: dict[str, int]) -> None:
    train(latents, tmp_path, stop=2)
    with pytest.raises(ConfigError, match="the checkpoint's"):
        train(latents, tmp_path, **change)
