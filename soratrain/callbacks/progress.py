"""How far the run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from soratrain.amounts import duration, short
from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.step import StepCallback
from soratrain.stages.base import TrainStage

WIDE = 100  # columns
MUCH = 0.05  # of the time waited for the loader

log = logging.getLogger(__name__)


class Progress(StepCallback):
    """Shows steps done and to do, time left, the loss and the speed, on rank 0.

    Args:
        metrics: whose newest row is shown.
        title: what is being trained.
        seconds: between two lines where there is no terminal.
    """

    def __init__(self, metrics: Metrics, *, title: str, seconds: float = 15.0) -> None:
        super().__init__()
        self.metrics, self.title, self.seconds = metrics, title, seconds
        self.console = Console(stderr=True)
        self.bar: Bar | None = None
        self.task: Any = None
        self.first, self.began, self.said = 0, 0.0, 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainStage)
        self.first, self.began = self.step, time.monotonic()
        self.said = self.began
        if trainer.is_global_zero and self.console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Bar(*columns, TextColumn("{task.fields[text]}"), console=self.console)
            self.task = self.bar.add_task(self.title, total=pl_module.max_steps, completed=self.step, text="")
            self.bar.start()

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=self.step, text=self.text())
        elif trainer.is_global_zero:
            now = time.monotonic()
            if now - self.said >= self.seconds or self.step >= stage.max_steps:
                self.said = now
                left = (now - self.began) / max(self.step - self.first, 1) * (stage.max_steps - self.step)
                log.info(
                    "%s %d/%d  %d %%  %s  left %s",
                    self.title,
                    self.step,
                    stage.max_steps,
                    100 * self.step // stage.max_steps,
                    self.text(),
                    duration(left),
                )

    def text(self) -> str:
        """Return the newest loss and speed, the share of the hardware that is used, and of waiting if that is much."""
        row, parts = self.metrics.row, []
        if "loss" in row:
            parts.append(f"loss {row['loss']:.4g}")
        rates = (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s"))
        parts += [f"{short(row[key])} {unit}" for key, unit in rates if key in row][:1]
        waits = [f"data {100 * row['data_wait']:.0f} %"] if row.get("data_wait", 0.0) >= MUCH else []
        used = [f"MFU {100 * row['mfu']:.0f} %"] if "mfu" in row else []
        if self.console.width < WIDE:  # room for one of them: what holds the run up
            used = [] if waits else used
        return "  ".join(parts + used + waits)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
