"""Callbacks that act once an optimizer step, however many micro-batches it takes."""

from __future__ import annotations

from typing import Any

import lightning as L

from soratrain.stages.base import TrainStage


class StepCallback(L.Callback):
    """Calls `on_step` after each optimizer step; `trainer.global_step` has been counted up by then."""

    def __init__(self) -> None:
        self.step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self.step:
            self.step = trainer.global_step
            assert isinstance(pl_module, TrainStage)
            self.on_step(trainer, pl_module)

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        """Act; `self.step` optimizer steps are done."""
