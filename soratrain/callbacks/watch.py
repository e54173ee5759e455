"""Watches a run: a rank that fails, or one that stands still, ends all of it."""

from __future__ import annotations

import lightning as L

from soratrain.distributed import halt
from soratrain.distributed.phases import Phases
from soratrain.distributed.watchdog import Watchdog
from soratrain.errors import ConfigError


class Watch(L.Callback):
    """Starts and stops the watchdog; the first of the callbacks, so that a failure is told before anything tidies up.

    Args:
        phases: the trainer's profiler.
        minutes: without a move after which a run has stalled; 0 looks for failures only.
    """

    def __init__(self, phases: Phases, *, minutes: float) -> None:
        if minutes < 0:
            raise ConfigError(f"trainer.stall_minutes={minutes}: must be at least 0; 0 waits for ever")
        self.phases, self.minutes = phases, minutes
        self.dog: Watchdog | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        halt.watch()
        if self.minutes:
            self.dog = Watchdog(
                self.phases, limit=60 * self.minutes, local=trainer.local_rank, locals=trainer.num_devices
            )
            self.dog.begin()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.phases.follow(lambda: trainer.global_step)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        halt.failed(exception)

    def part(self, *, wait: bool) -> None:
        """Stop watching; see `Watchdog.part`."""
        if self.dog is not None:
            self.dog.part(wait=wait)
            self.dog = None
