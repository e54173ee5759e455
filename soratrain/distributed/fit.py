"""Training from where a run stands to its last step, or to where it is told to stop."""

from __future__ import annotations

import signal
from pathlib import Path

import lightning as L

from soratrain.callbacks.checkpoint import Checkpoint, GracefulStop
from soratrain.callbacks.export import Export
from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.watch import Watch
from soratrain.distributed.checkpoint import read_state, saved_checkpoints
from soratrain.distributed.mesh import Mesh
from soratrain.errors import DataError
from soratrain.stages.base import TrainStage
from soratrain.stages.manual import ManualStage


class StoppedError(KeyboardInterrupt):
    """The run was told to stop, has saved a checkpoint, and goes on with the same command.

    Attributes:
        received: the signal's number.
    """

    def __init__(self, message: str, received: int) -> None:
        super().__init__(message)
        self.received = received


def fit(trainer: L.Trainer, stage: TrainStage, data: L.LightningDataModule) -> dict[str, float]:
    """Train from the newest whole checkpoint, if any, to the last step; return the last row of metrics.

    Which checkpoint that is, the strategy finds when its ranks have found each other.

    Raises:
        StoppedError: a signal came; a checkpoint is saved.
        KeyboardInterrupt: Ctrl-C came before the first step, or twice; the last checkpoint stands.
    """
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    checkpoint = next(item for item in callbacks if isinstance(item, Checkpoint))
    stop = next(item for item in callbacks if isinstance(item, GracefulStop))
    export = next(item for item in callbacks if isinstance(item, Export))
    metrics = next(item for item in callbacks if isinstance(item, Metrics))
    start = bool(saved_checkpoints(checkpoint.folder))
    settle_accumulation(trainer, data, checkpoint.folder)
    if isinstance(stage, ManualStage) and not stage.automatic_optimization:
        stage.take_over(trainer)
    watch = next(item for item in callbacks if isinstance(item, Watch))
    whole = False
    try:
        trainer.fit(stage, datamodule=data, ckpt_path=str(checkpoint.folder) if start else None, weights_only=True)
        whole = True
    except SystemExit as stopped:  # Lightning's way of passing on a KeyboardInterrupt, which it ignores from then on
        signal.signal(signal.SIGINT, signal.default_int_handler)
        raise KeyboardInterrupt from stopped
    finally:
        watch.part(wait=whole)
    if stop.received and not export.done:
        left = "" if trainer.global_step < stage.max_steps else ", before its weights were exported"
        raise StoppedError(
            f"stopped at step {trainer.global_step} of {stage.max_steps}{left}; the same command goes on",
            stop.received,
        )
    return metrics.result() | checkpoint.told()


def settle_accumulation(trainer: L.Trainer, data: L.LightningDataModule, folder: Path) -> None:
    """Accumulate as many micro-batches as the data say that a rank has in a step.

    That number follows from the ranks there are and those that the run was begun with, which any checkpoint knows.
    """
    ask = getattr(data, "accumulation", None)
    if ask is None:
        return
    for place in reversed(saved_checkpoints(folder)):
        try:
            stored = read_state(place).get(type(data).__qualname__)
        except DataError:
            continue  # it will be said when ranks have found each other
        if stored:
            data.load_state_dict(stored)
        break
    trainer.accumulate_grad_batches = ask(Mesh.of(trainer).data_ranks)
