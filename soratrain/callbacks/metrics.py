"""What a stage reports, gathered over steps and ranks: the loss, other figures, and how fast it goes.

A row stands for all steps since the last one. Rows go to `metrics.csv`, to the logger and to the progress bar; the
sums of an unfinished row travel in checkpoints, so that a continued run writes the rows of an unbroken one.
"""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.callbacks.step import StepCallback
from soratrain.callbacks.throughput import COLUMNS, Throughput
from soratrain.data.atomic import replacing
from soratrain.distributed.mesh import Mesh
from soratrain.distributed.phases import Phases
from soratrain.errors import DivergedError, on_all_ranks
from soratrain.stages.base import CAPTIONS, COUNTS, MODES_SHOWN, SHARES, SHOWN, TrainStage, summed

VITAL = {"loss": "loss", "grad_norm": "gradient's norm"}  # what must be finite, and what it is called
log = logging.getLogger(__name__)

NOT_REPEATABLE = COLUMNS  # what depends on the machine, and on how often a run was stopped


class Metrics(StepCallback):
    """Writes a row every `every` steps and at the end, and stops a run whose loss or gradient is not finite.

    A figure that only some steps of a row have is their mean. A stage that skips bad steps (`StepGuard`) reports no
    figures of them, so what is stopped here is where no step can be skipped.

    Args:
        file: the CSV; its columns may grow. On a resumed run, rows of steps that will be done again are dropped.
        every: steps a row.
        throughput: what measures its speed.
    """

    def __init__(self, file: Path, *, every: int, throughput: Throughput | None = None) -> None:
        super().__init__()
        self.file, self.every, self.throughput = Path(file), every, throughput or Throughput(Phases())
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}  # steps that each of the sums is of
        self.steps = 0
        self.mesh = Mesh(0, 1)
        self.row: dict[str, float] = {}
        self.rows: list[dict[str, str]] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.throughput.begin()
        if trainer.is_global_zero:
            self.rows = [row for row in read_rows(self.file) if float(row["step"]) <= self.step]
            write_rows(self.file, self.rows)
            self.row = {key: float(value) for key, value in self.rows[-1].items() if value} if self.rows else {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.mesh = Mesh.of(trainer)

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        values = stage.take_reported()
        norm = getattr(trainer.model, "get_global_grad_norm", lambda: None)()  # DeepSpeed clips by itself
        if norm is not None:
            values["grad_norm"] = torch.as_tensor(norm, dtype=torch.float64)
        self.throughput.note(values)
        for key, value in values.items():
            self.sums[key] = self.sums[key] + value if key in self.sums else value
            self.counts[key] = self.counts.get(key, 0) + 1
        self.steps += 1
        if self.step % self.every == 0:
            self.finish_row(trainer, stage)
        elif stage.device.type == "cpu" and trainer.world_size == 1:
            self.check({key: float(value) for key, value in values.items()})

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainStage)
        if self.step >= pl_module.max_steps:
            if self.steps:
                self.finish_row(trainer, pl_module)
            for words in filter(None, (captions_shown(self.rows), modes_shown(self.rows))):
                log.info("%s", words)

    def finish_row(self, trainer: L.Trainer, stage: TrainStage) -> None:
        """Reduce the sums over ranks and write them as a row.

        Raises:
            DivergedError: on every rank, when the loss or the gradient of any is not finite.
        """
        means = self.reduced(stage.device)
        self.check(means)
        row: dict[str, float] = {"step": self.step}
        row |= {key: means[key] for key in sorted(means, key=lambda key: (key != "loss", key)) if not summed(key)}
        row["lr"] = stage.optimizer_factory.lr * stage.schedule(self.step - 1, stage.max_steps)
        for key in COUNTS:
            if key in means:
                row[key] = means[key] * self.steps
        row |= self.shares(means)
        row |= self.throughput.row(means, left=stage.max_steps - self.step, device=stage.device)
        self.row, self.sums, self.counts, self.steps = row, {}, {}, 0
        self.throughput.begin()
        for logger in trainer.loggers:
            logger.log_metrics({key: value for key, value in row.items() if key != "step"}, step=self.step)
        if trainer.is_global_zero:
            self.rows.append({key: shown(value) for key, value in row.items()})
            append_row(self.file, self.rows)

    def result(self) -> dict[str, float]:
        """Return what a finished run says of itself: the last row, and how many updates were skipped in all.

        A last row without a loss, all of whose updates were skipped, is said.
        """
        skipped = sum(float(row.get("bad_steps") or 0) for row in self.rows)
        if self.row and "loss" not in self.row and self.rows:
            log.warning(
                "the run ends without a loss: %d of its updates were skipped, the last ones among them; lower"
                " optimizer.lr, or set trainer.precision=32-true, with fresh=true",
                skipped,
            )
        return self.row | ({"bad_steps": skipped} if "bad_steps" in self.row else {})

    def reduced(self, device: torch.device) -> dict[str, float]:
        """Return the means over steps of this row so far: counts summed over ranks, the rest averaged.

        Ranks that share their micro-batches count each sample once.
        """
        keys = sorted(self.sums)
        if not keys:
            return {}
        values = torch.stack([self.sums[key].to(device) for key in keys])
        if dist.is_initialized() and dist.get_world_size() > 1:
            own = [self.mesh.counts or not summed(key) for key in keys]
            values = values.masked_fill(~torch.tensor(own, device=values.device), 0.0)
            dist.all_reduce(values)
            ranks = dist.get_world_size()
            values = values / torch.tensor([1 if summed(key) else ranks for key in keys], device=values.device)
        steps = torch.tensor([self.steps if summed(key) else self.counts[key] for key in keys], device=values.device)
        return dict(zip(keys, (values / steps.clamp(min=1)).tolist(), strict=True))

    def shares(self, means: Mapping[str, float]) -> dict[str, float]:
        """Return the share of the row's samples of each kind (of caption, of mode) that the run has shown."""
        shares = {key: value / means["samples"] for key, value in means.items() if key.startswith(SHARES)}
        return {key: value for key, value in shares.items() if value or key in columns(self.rows)}

    def check(self, values: Mapping[str, float]) -> None:
        for name, called in VITAL.items():
            if not math.isfinite(values.get(name, 0.0)):
                raise on_all_ranks(
                    DivergedError(
                        f"the {called} is {values[name]} at step {self.step}; the last checkpoint stands: lower"
                        " optimizer.lr, or set trainer.precision=32-true"
                    )
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the unfinished row for a checkpoint.

        Raises:
            DivergedError: on every rank, before anything is written: the weights are spoilt, or are about to be.
        """
        means = self.reduced(next(iter(self.sums.values())).device) if self.sums else {}
        self.check(means)
        return {"means": means, "steps": self.steps, "counts": dict(self.counts)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        ranks = self.mesh.data_ranks
        self.steps, self.counts = state_dict["steps"], dict(state_dict["counts"])
        self.sums = {
            key: torch.tensor(mean * (self.steps / ranks if summed(key) else self.counts[key]), dtype=torch.float64)
            for key, mean in state_dict["means"].items()
        }


def captions_shown(rows: list[dict[str, str]]) -> str:
    """Return in words of which sources and types the captions were that a run has shown, by the rows of its CSV."""
    found = shares_of(rows, CAPTIONS)
    parts = [", ".join(f"{name} {found[name]:.1%}" for name in kind if found.get(name)) for kind in SHOWN]
    parts += [f"{found['cut']:.1%} were cut, being longer than is read"] if found.get("cut") else []
    return f"captions shown: {'; '.join(part for part in parts if part)}" if found else ""


def modes_shown(rows: list[dict[str, str]]) -> str:
    """Return in words how a run has shown its clips, by the rows of its CSV; nothing where it has but one way."""
    found = shares_of(rows, MODES_SHOWN)
    short = found.pop("too_short", 0.0)
    parts = [f"{name} {share:.1%}" for name, share in sorted(found.items(), key=lambda item: -item[1])]
    less = f"; {short:.1%} were too short, or had no stored end, for what was drawn" if short else ""
    return f"clips shown as: {', '.join(parts)}{less}" if parts else ""


def shares_of(rows: list[dict[str, str]], prefix: str) -> dict[str, float]:
    """Return the share of all samples that each column has whose name begins with `prefix`, by the name's rest."""
    samples = sum(float(row.get("samples") or 0) for row in rows)
    return {
        name.removeprefix(prefix): sum(float(row.get(name) or 0) * float(row["samples"]) for row in rows) / samples
        for name in columns(rows)
        if name.startswith(prefix)
    }


def shown(value: float) -> str:
    """Return a number for the CSV: whole ones as such, others with nine digits, enough to tell any two fp32 apart."""
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else f"{value:.9g}"


def read_rows(file: Path) -> list[dict[str, str]]:
    """Return the whole rows of a CSV, none if there is no file; a last line that was cut short is left out."""
    if not file.is_file():
        return []
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
    return [row for row in csv.DictReader(line for line in lines if line.endswith("\n")) if row.get("step")]


def columns(rows: list[dict[str, str]]) -> list[str]:
    """Return the columns of `rows` in order of appearance."""
    return list(dict.fromkeys(key for row in rows for key in row)) or ["step"]


def write_rows(file: Path, rows: list[dict[str, str]]) -> None:
    """Write `rows` as a CSV, whole or not at all."""
    with replacing(file) as path, path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns(rows))
        writer.writeheader()
        writer.writerows(rows)


def append_row(file: Path, rows: list[dict[str, str]]) -> None:
    """Add the last of `rows` to the CSV; where it brings a new column, the file is written again."""
    if len(rows) < 2 or columns(rows[:-1]) != columns(rows):
        write_rows(file, rows)
        return
    with file.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, columns(rows)).writerow(rows[-1])
