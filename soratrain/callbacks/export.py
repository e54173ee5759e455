"""Writes `weights/` when a run has reached its last step."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import lightning as L
from torch import Tensor

from soratrain.callbacks.ema import EMA
from soratrain.distributed.fragments import assemble, persistent_buffers
from soratrain.distributed.strategy import Restorable
from soratrain.models import weights
from soratrain.stages.base import TrainStage


class Export(L.Callback):
    """Exports the nets of `stage.exported()`, with averaged weights where there is an average.

    Parameters are gathered one at a time from the ranks' slices to rank 0's memory, which holds the whole nets once.

    Args:
        folder: where the weights go.
        ema: the average, if any.
    """

    def __init__(self, folder: Path, ema: EMA | None = None) -> None:
        self.folder, self.ema = Path(folder), ema

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainStage)
        if trainer.global_step < pl_module.max_steps:
            return
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        with self.ema.in_place(trainer) if self.ema else nullcontext():
            training = pl_module.training
            pl_module.eval()
            with strategy.computing():
                pl_module.finalize()
            state = whole_state(trainer)
            pl_module.train(training)
        if not trainer.is_global_zero:
            return
        names = {id(module): name for name, module in pl_module.named_modules()}
        for name, (module, factory, extra) in pl_module.exported().items():
            prefix = f"{names[id(module)]}."
            own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
            weights.save(self.folder, name, own, factory, {**extra, "step": trainer.global_step})


def whole_state(trainer: L.Trainer) -> dict[str, Tensor]:
    """Return every parameter and persistent buffer, whole and on the CPU, on rank 0; collective."""
    strategy = trainer.strategy
    assert isinstance(strategy, Restorable)
    fragments = strategy.fragments()
    state: dict[str, Tensor] = {}
    for name, value in assemble(fragments, [fragment.read() for fragment in fragments]):
        if trainer.is_global_zero:
            state[name] = value
    state |= {name: buffer.detach().cpu() for name, buffer in persistent_buffers(trainer.lightning_module).items()}
    return state
