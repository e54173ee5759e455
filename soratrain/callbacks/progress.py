"""How far the run is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import time
from typing import Any

import lightning as L
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar

from soratrain.amounts import duration, short
from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.step import StepCallback
from soratrain.stages.base import TrainStage

WIDE = 100  # columns
NARROW_BAR, WIDE_BAR = 10, 16  # of them
MUCH, LITTLE = 0.05, 0.005  # of the time waited for the loader; of positions that are padding

log = logging.getLogger(__name__)


class Progress(StepCallback):
    """Shows steps done and to do, time left, the loss, the speed and what holds it up, on rank 0.

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
        self.said, self.width = 0.0, NARROW_BAR

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        assert isinstance(pl_module, TrainStage)
        self.said = time.monotonic()
        if trainer.is_global_zero and self.console.is_terminal:
            self.open(pl_module.max_steps)

    def open(self, steps: int) -> None:
        """Show a bar over so many steps."""
        self.width = WIDE_BAR if self.console.width >= WIDE else NARROW_BAR
        text = TextColumn("{task.fields[text]}", markup=False)
        columns = TextColumn("{task.description}"), BarColumn(self.width), MofNCompleteColumn(), text
        self.bar = Bar(*columns, console=self.console)
        self.task = self.bar.add_task(self.title, total=steps, completed=self.step, text="-:--:--")
        self.bar.start()

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.bar is not None:
            taken = len(self.title) + self.width + 2 * len(str(stage.max_steps)) + 1 + 3  # and a space after each
            left, room = self.left(stage.max_steps), self.console.width - taken
            self.bar.update(self.task, completed=self.step, text=f"{left}  {self.text(room - len(left) - 2)}")
        elif trainer.is_global_zero:
            now = time.monotonic()
            if now - self.said >= self.seconds or self.step >= stage.max_steps:
                self.said = now
                log.info(
                    "%s %d/%d  %d %%  %s  left %s",
                    self.title,
                    self.step,
                    stage.max_steps,
                    100 * self.step // stage.max_steps,
                    self.text(),
                    self.left(stage.max_steps),
                )

    def left(self, steps: int) -> str:
        """Return the time until step `steps`; what `metrics.csv` says where this step has a row."""
        seconds = self.metrics.throughput.seconds_left(steps - self.step)
        return "-:--:--" if seconds is None else duration(seconds)

    def text(self, room: int | None = None) -> str:
        """Return the newest loss and speed, what holds it up, and the use of the hardware; the chief things first.

        Args:
            room: columns; what does not fit is left out.
        """
        row, line = self.metrics.row, ""
        rates = (("tokens_per_s", "tokens/s"), ("samples_per_s", "samples/s"))
        parts = [f"loss {row['loss']:.4g}"] if "loss" in row else []
        parts += [f"{short(row[key])} {unit}" for key, unit in rates if key in row][:1]
        for key, called, least in (("data_wait", "data", MUCH), ("mfu", "MFU", 0.0)):
            parts += [f"{called} {100 * row[key]:.0f} %"] if row.get(key, -1.0) >= least else []
        parts += [f"{row['memory_gib']:.3g} GiB"] if "memory_gib" in row else []
        for key, called, least in (("balance", "bal", 0.0), ("padding", "pad", LITTLE)):
            parts += [f"{called} {100 * row[key]:.0f} %"] if row.get(key, -1.0) >= least else []
        for part in parts:
            longer = f"{line}  {part}".strip()
            if room is None or len(longer) <= room:
                line = longer
        return line

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
