"""Saves checkpoints as training goes, and when somebody wants it to stop."""

from __future__ import annotations

import logging
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from soratrain import slurm
from soratrain.callbacks.step import StepCallback
from soratrain.distributed.checkpoint import folder_of, saved_checkpoints
from soratrain.errors import ConfigError
from soratrain.stages.base import TrainStage

log = logging.getLogger(__name__)


class Checkpoint(StepCallback):
    """Saves every `every` steps and at the last one, and keeps the newest `keep`.

    Args:
        folder: where the checkpoints lie.
        every: steps between two; 0 saves at the end only.
        keep: how many stay.
    """

    def __init__(self, folder: Path, *, every: int, keep: int) -> None:
        super().__init__()
        if every < 0 or keep < 1:
            raise ConfigError(f"trainer.checkpoint_every={every} must be at least 0 and trainer.keep={keep} at least 1")
        self.folder, self.every, self.keep = Path(folder), every, keep
        self.saved = -1

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.every and self.step % self.every == 0 and self.step < stage.max_steps:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainStage)
        if trainer.global_step >= pl_module.max_steps:
            self.save(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save the present step, once."""
        step = trainer.global_step
        if step == self.saved:
            return
        trainer.save_checkpoint(folder_of(self.folder, step))
        self.saved = step
        if trainer.is_global_zero:
            for old in saved_checkpoints(self.folder)[: -self.keep]:
                shutil.rmtree(old, ignore_errors=True)


class GracefulStop(StepCallback):
    """On Ctrl-C, SIGTERM or a scheduler's SIGUSR1 or 2, finish the step, save, and stop; a second Ctrl-C stops at once.

    The ranks agree at the end of each step, so that all stop at the same one, whichever of them was told.

    Attributes:
        received: the signal's number, 0 while there was none.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        self.checkpoint = checkpoint
        self.received = 0
        self.before: dict[int, Any] = {}
        self.group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        # Lightning asks all ranks before each batch whether one got a SIGTERM, and waits for the device to answer.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]
        if trainer.world_size > 1:
            self.group = dist.new_group(backend="gloo")  # asks from CPU to CPU, so that no device has to wait
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *slurm.SIGNALS):
                self.before[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        """Take note of the signal. Schedulers send SIGTERM several times; only a person means the second one."""
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.agreed() and self.step < stage.max_steps:
            log.info("stopping after step %d (signal %d): saving a checkpoint", self.step, self.received)
            self.checkpoint.save(trainer)
            trainer.should_stop = True

    def agreed(self) -> bool:
        """Return whether any rank has got a signal."""
        if self.group is not None:
            flag = torch.tensor([self.received])
            dist.all_reduce(flag, op=dist.ReduceOp.MAX, group=self.group)
            self.received = int(flag)
        return self.received != 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.restore()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.restore()

    def restore(self) -> None:
        """Put back the signal handlers that were there before; Lightning then puts back those before its own."""
        for number, handler in self.before.items():
            signal.signal(number, handler)
        self.before = {}
