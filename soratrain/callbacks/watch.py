"""Watches a run: a rank that fails, or one that stands still, ends all of it."""

from __future__ import annotations

from datetime import timedelta

import lightning as L

from soratrain.distributed import halt
from soratrain.distributed.phases import Phases
from soratrain.distributed.watchdog import Watchdog
from soratrain.errors import ConfigError

LONG = 0.9  # of the time that ranks wait for each other


class Watch(L.Callback):
    """Starts and stops the watchdog; the first of the callbacks, so that a failure is told before anything tidies up.

    Args:
        phases: the trainer's profiler.
        minutes: without a move after which a run has stalled; 0 looks for failures only.
        timeout: after which a rank no longer waits for another. What may take long is given a little less, so that it
            is named before whoever waits for it ends with a message that names nobody.
    """

    def __init__(self, phases: Phases, *, minutes: float, timeout: timedelta) -> None:
        if minutes < 0:
            raise ConfigError(f"trainer.stall_minutes={minutes}: must be at least 0; 0 waits for ever")
        self.phases, self.limit, self.long = phases, 60 * minutes, max(60 * minutes, LONG * timeout.total_seconds())
        self.dog: Watchdog | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        halt.watch()
        if self.limit:
            local, locals = trainer.local_rank, trainer.num_devices
            self.dog = Watchdog(self.phases, limit=self.limit, long=self.long, local=local, locals=locals)
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
