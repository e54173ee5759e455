"""The loss on clips that are never trained on, at fixed noise levels, with fixed noise and captions.

A clip's noise and caption depend on its key alone, so any two tables, of one run or of several, answer the same
questions. The levels are quantiles of those that the objective trains at: each stands for an equal share of training,
their mean is what training would report of these clips, and none falls where nothing is learned. Text to video alone
is asked, without caption dropout, whatever else a run gives in training.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.batch import LatentBatch
from soratrain.callbacks import loggers
from soratrain.callbacks.apart import apart
from soratrain.callbacks.ema import EMA
from soratrain.callbacks.metrics import Metrics, read_rows, write_rows
from soratrain.callbacks.step import StepCallback
from soratrain.callbacks.validation_table import Table
from soratrain.data.held_clips import HeldClips
from soratrain.data.planned import PlannedData
from soratrain.diffusion.arrange import Case
from soratrain.distributed.checkpoint import gather
from soratrain.distributed.mesh import Mesh
from soratrain.distributed.turns import Turn, deal
from soratrain.errors import ConfigError, DataError
from soratrain.heatmap import draw
from soratrain.stages.base import TrainStage
from soratrain.stages.dit import DiTStage

log = logging.getLogger(__name__)

ASKED = Case("t2v", "t2v")


class Validation(StepCallback):
    """Measures every `every` steps and at the last, with the trained weights and with their average.

    Every figure goes to `validation.csv`, and a picture of each table to `validation/`; the mean over clips and levels,
    of the average where there is one, is reported as `val_loss`. Ranks share the clips and make equally many calls of
    the net, as ZeRO-3 needs it; those that share their tokens have the same clips. The time that it takes is not
    counted in the training's speed.

    Args:
        out: the stage's folder.
        metrics: whose clock is set back, and whose phases are told how far it has come.
        ema: the average, if any.
        precision: `32-true` or `bf16-mixed`.
        every: steps; 0 never measures.
        levels: noise levels.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self, *, out: Path, metrics: Metrics, ema: EMA | None, precision: str, every: int, levels: int = 10
    ) -> None:
        super().__init__()
        if every < 0:
            raise ConfigError(f"validation.every={every}: must be at least 0; 0 measures nothing")
        if levels < 1:
            raise ConfigError(f"validation.levels={levels}: must be at least 1")
        self.file, self.folder = Path(out) / "validation.csv", Path(out) / "validation"
        self.metrics, self.ema, self.half = metrics, ema, precision.startswith("bf16")
        self.every, self.levels = every, levels
        self.held: HeldClips | None = None
        self.room = 0  # tokens that are computed at once: as many as are trained on at once
        self.damaged: set[int] = set()
        self.mesh = Mesh(0, 1)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if not self.every:
            return
        self.mesh = Mesh.of(trainer)
        data = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, PlannedData)
        self.held, self.room = data.held(), data.plan().blocks.largest[0]
        if trainer.is_global_zero and self.file.is_file():  # without the steps that will be done again
            write_rows(self.file, [row for row in read_rows(self.file) if float(row["step"]) <= self.step])
        if trainer.is_global_zero and not len(self.held):
            log.info("validation: of so few samples none is held out, so nothing is measured")

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.held and (self.step % self.every == 0 or self.step >= stage.max_steps):
            assert isinstance(stage, DiTStage)
            began = time.monotonic()
            self.measure(trainer, stage, self.held)
            self.metrics.throughput.began += time.monotonic() - began

    def measure(self, trainer: L.Trainer, stage: DiTStage, held: HeldClips) -> None:
        """Measure now, and hand on what was found."""
        began = time.monotonic()
        turns, clips = self.read(stage, held)
        levels, raw = self.losses(stage, len(held), turns, clips)
        losses = {"raw": raw}
        if self.ema:
            with self.ema.in_place(trainer):
                losses = {"ema": self.losses(stage, len(held), turns, clips)[1], **losses}
        good = [number for number in range(len(held)) if number not in self.damaged]
        buckets = [held.buckets[number] for number in good]
        table = Table.of({name: values[good] for name, values in losses.items()}, buckets, levels[good])
        stage.score = (self.step, float(table.mean(table.first)))
        stage.report(val_loss=stage.score[1])
        if trainer.is_global_zero:
            rows, picture = table.rows(self.step), self.folder / f"{self.step:08d}.png"
            write_rows(self.file, [*read_rows(self.file), *rows])
            draw(picture, f"loss on {len(good)} held-out clips, step {self.step}", table)
            for logger in trainer.loggers:
                loggers.show_table(logger, self.step, "validation", rows)
                loggers.show_files(logger, self.step, "validation/losses", [picture])
            log.info("validation at step %d: %s; %.1f s", self.step, table.words(), time.monotonic() - began)

    def read(self, stage: DiTStage, held: HeldClips) -> tuple[list[Turn], dict[int, LatentBatch]]:
        """Return this rank's turns, and the clips that it needs for them; all ranks leave out what one cannot read.

        Raises:
            DataError: none can be read.
        """
        ranks, rank = self.mesh.data_ranks, self.mesh.data_rank
        while True:
            left = {number: size.tokens for number, size in enumerate(held.buckets) if number not in self.damaged}
            if not left:
                raise DataError("validation: none of the held-out clips can be read; encode them again")
            turns, damaged = deal(left, ranks, self.levels, self.room)[rank], set[int]()
            clips: dict[int, LatentBatch] = {}
            for number in {turn.clip for turn in turns}:
                try:
                    batch = held.read(number).to(stage.device)
                    clips[number] = stage.encoded(batch)  # type: ignore[arg-type]
                except DataError as error:
                    log.warning("validation: %s is left out: %s", held.key(number), error)
                    damaged.add(number)
                self.metrics.throughput.phases.move(alike=False)
            found = set[int]().union(*gather(damaged))
            if not found:
                return turns, clips
            self.damaged |= found

    def losses(
        self, stage: DiTStage, count: int, turns: Sequence[Turn], clips: dict[int, LatentBatch]
    ) -> tuple[Tensor, Tensor]:
        """Return the noise levels and losses of all clips, each `[clips, levels]`, on the CPU of every rank."""
        found = torch.zeros(2, count, self.levels, dtype=torch.float64, device=stage.device)
        half = torch.autocast(stage.device.type, torch.bfloat16) if self.half else nullcontext()
        shares = (torch.arange(self.levels, dtype=torch.float32) + 0.5) / self.levels
        with apart(stage.dit, stage.text), half:
            for turn in turns:
                clip = clips[turn.clip]
                tokens = clip.latents[0][0].numel() // stage.dit.patch_size
                levels = stage.objective.levels(shares, torch.full((self.levels,), tokens))
                pieces = torch.arange(self.levels).tensor_split(turn.parts)
                for call in range(turn.calls):
                    piece = pieces[min(call, turn.parts - 1)]
                    asked = repeated(clip, len(piece))
                    text = stage.text(stage.text.tokenize(asked.captions, asked.text))
                    answer, _ = stage.losses_at(levels[piece], asked, [ASKED] * len(piece), text)
                    if turn.counts and self.mesh.counts and call < turn.parts:
                        found[0, turn.clip, piece] = levels[piece].to(found)
                        found[1, turn.clip, piece] = answer.to(found)
                    self.metrics.throughput.phases.move()
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(found)
        return found[0].cpu(), found[1].cpu()


def repeated(clip: LatentBatch, count: int) -> LatentBatch:
    """Return a batch of `count` times the one clip of a batch."""
    return LatentBatch(
        keys=clip.keys * count,
        captions=clip.captions * count,
        fps=clip.fps.repeat(count),
        weights=clip.weights.repeat(count),
        draws=clip.draws.repeat(count),
        scale=clip.scale,
        latents=clip.latents * count,
        text=clip.text * count,
    )
