"""An exponential moving average of the weights, in fp32, kept beside the optimizer's own slices of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
import torch
from torch import Tensor

from soratrain.callbacks.step import StepCallback
from soratrain.distributed.fragments import Fragment
from soratrain.distributed.strategy import Restorable
from soratrain.errors import ConfigError
from soratrain.stages.base import TrainStage


class EMA(StepCallback):
    """Averages the trained weights after each step.

    The decay warms up as min(decay, (1 + t) / (10 + t)), so that a short run is not mostly its first weights
    (TensorFlow's ExponentialMovingAverage with `num_updates`). Each rank averages what its optimizer holds: under ZeRO
    the average is sharded like the optimizer. The strategy saves and restores it with the weights.

    Args:
        decay: of the average, in [0, 1).
    """

    def __init__(self, decay: float) -> None:
        super().__init__()
        if not 0 <= decay < 1:
            raise ConfigError(f"trainer.ema={decay} must lie in [0, 1); 0 turns averaging off")
        self.decay = decay
        self.fragments: list[Fragment] = []
        self.averages: list[Tensor] = []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        self.fragments = [fragment for fragment in strategy.fragments() if fragment.trained]
        self.averages = [fragment.read().float().clone() for fragment in self.fragments]
        strategy.averages = self.averages

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        decay = min(self.decay, (1 + self.step) / (10 + self.step))
        if self.averages:
            torch._foreach_lerp_(self.averages, [fragment.read() for fragment in self.fragments], 1 - decay)

    @contextmanager
    def in_place(self, trainer: L.Trainer) -> Iterator[None]:
        """Compute with the averaged weights inside the block, with the trained ones after it."""
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        trained = [fragment.read().clone() for fragment in self.fragments]
        try:
            for fragment, average in zip(self.fragments, self.averages, strict=True):
                fragment.write(average)
            strategy.publish()
            yield
        finally:
            for fragment, value in zip(self.fragments, trained, strict=True):
                fragment.write(value)
            strategy.publish()
