"""Saves checkpoints as training goes, and when somebody wants it to stop."""

from __future__ import annotations

import logging
import math
import shutil
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from soratrain import slurm
from soratrain.callbacks.step import StepCallback
from soratrain.distributed.checkpoint import (
    UnreadableError,
    folder_of,
    gather,
    problem_of,
    read_state,
    remove_parts,
    saved_checkpoints,
    step_of,
)
from soratrain.distributed.saving import Saver
from soratrain.errors import ConfigError, DataError, on_all_ranks
from soratrain.stages.base import TrainStage

log = logging.getLogger(__name__)

SCORE = "score"  # what a checkpoint calls the loss on held-out clips


class Checkpoint(StepCallback):
    """Saves every `every` steps and at the last one; keeps the newest `keep` and those of the lowest losses.

    What a stage measures on held-out clips (`TrainStage.score`) goes into the checkpoint of its step, and a step that
    is among the best so far is saved whenever it comes.

    Args:
        folder: where the checkpoints lie.
        every: steps between two; 0 saves at the end only.
        keep: how many of the newest stay.
        keep_best: how many of the lowest losses stay beside them.
        beside: write while training goes on, where there is memory for a copy.
        timeout: how long a rank waits for another; None for torch's half hour.
        moved: called whenever more is written for which training waits.

    Attributes:
        scores: the loss of each step that has a checkpoint with one.
        untouched: steps whose checkpoints are not removed: whether they are among the best could not be read.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        keep: int,
        keep_best: int = 0,
        beside: bool = True,
        timeout: timedelta | None = None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__()
        if every < 0 or keep < 1 or keep_best < 0:
            raise ConfigError(
                f"trainer.checkpoint_every={every} and trainer.keep_best={keep_best} must be at least 0, and"
                f" trainer.keep={keep} at least 1"
            )
        self.folder, self.every, self.keep, self.keep_best = Path(folder), every, keep, keep_best
        self.timeout = timeout
        self.saver = Saver(beside=beside, after=self.tidy, timeout=timeout, moved=moved)
        self.saved = -1
        self.scores: dict[int, float] = {}
        self.untouched: set[int] = set()

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.saver.open()
        said = None
        if trainer.is_global_zero:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for name in remove_parts(self.folder):
                    log.info("what there was of %s, whose writing was cut short, is removed", name)
            except OSError as error:
                said = f"{self.folder}: cannot be written ({error.strerror}); give run=NAME or out=FOLDER elsewhere"
        if problem := gather(said)[0]:
            raise on_all_ranks(DataError(problem))
        seen = gather([path.name for path in saved_checkpoints(self.folder)])
        if any(names != seen[0] for names in seen):
            raise on_all_ranks(
                DataError(f"ranks do not see the same checkpoints in {self.folder}; is it shared by all nodes?")
            )

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if self.step:
            self.saved = self.step
        if self.keep_best:
            scores, self.untouched = gather(scores_of(self.folder) if trainer.is_global_zero else None)[0]
            self.scores = {step: score for step, score in scores.items() if step <= self.step}

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        self.saver.poll()
        if self.step >= stage.max_steps:
            return
        if (self.every and self.step % self.every == 0) or self.is_among_best(stage):
            self.save(trainer)

    def is_among_best(self, stage: TrainStage) -> bool:
        """Return whether the present step's loss is one of the lowest so far."""
        score = score_at(stage, self.step)
        if not self.keep_best or score is None:
            return False
        best = self.best()
        return len(best) < self.keep_best or score < self.scores[best[-1]]

    def best(self) -> list[int]:
        """Return the steps of the lowest losses, the lowest first."""
        return sorted(self.scores, key=lambda step: (self.scores[step], step))[: self.keep_best]

    def best_folder(self, trainer: L.Trainer) -> Path | None:
        """Return the whole checkpoint of the lowest loss, None where that is the present step's or there is none.

        One that is damaged is passed over, saying so; collective.

        Raises:
            UnreadableError: on every rank, where one cannot be read now: it may be whole.
        """
        self.saver.wait()
        stage, step = trainer.lightning_module, trainer.global_step
        assert isinstance(stage, TrainStage)
        present, best, scores, problem = score_at(stage, step), self.best(), self.scores, None
        there = gather([step_of(folder) for folder in saved_checkpoints(self.folder)])[0]
        for number in sorted(scores, key=lambda one: (scores[one], one)):
            if number == step or (present is not None and present < scores[number]):
                return None
            if number not in there and number not in best:
                continue  # long removed
            folder = folder_of(self.folder, number)
            problem = problem_of(folder)
            if problem is None:
                return folder
            if isinstance(problem, UnreadableError):
                raise on_all_ranks(
                    UnreadableError(
                        f"{problem}: see to that and give the same command again, which only exports; or move the"
                        " folder away to export the next best"
                    )
                )
            there = [one for one in there if one != number]
            self.scores = {one: score for one, score in scores.items() if one in there or one == step}
            if trainer.is_global_zero:
                log.warning("%s; the next best is exported instead", problem)
                self.tidy(saved_checkpoints(self.folder)[-1])  # it is not kept for its loss
        if problem is not None and trainer.is_global_zero:
            log.warning("no other is whole: the weights of the last step, %d, are exported", step)
        return None

    def told(self) -> dict[str, float]:
        """Return what a run's result says of its best checkpoint; nothing where none is kept."""
        best = self.best()
        return {"best_step": best[0], "best_val_loss": self.scores[best[0]]} if best else {}

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(pl_module, TrainStage)
        checkpoint[SCORE] = score_at(pl_module, trainer.global_step)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainStage)
        if trainer.global_step >= pl_module.max_steps:
            self.save(trainer, wait=True)
        self.saver.wait()
        self.saver.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt):  # it is urgent
            self.saver.give_up()
        try:
            self.saver.wait()
        except DataError as error:
            log.warning("%s", error)

    def save(self, trainer: L.Trainer, *, wait: bool = False) -> None:
        """Save the present step, once.

        Args:
            wait: for it to be written.
        """
        step, stage = trainer.global_step, trainer.lightning_module
        if step == self.saved:
            if wait:
                self.saver.wait()
            return
        self.saver.wait()  # before its thread hears of another loss
        self.saved = step
        assert isinstance(stage, TrainStage)
        score = score_at(stage, step)
        if self.keep_best and score is not None:
            self.scores[step] = score
        trainer.save_checkpoint(folder_of(self.folder, step), storage_options={"wait": wait})

    def tidy(self, newest: Path) -> None:
        """Remove the checkpoints that are not to stay, now that `newest` is whole."""
        step, best = step_of(newest), self.best()
        older = [folder for folder in saved_checkpoints(self.folder) if step_of(folder) <= step]
        kept = {*older[-self.keep :], *(folder_of(self.folder, number) for number in (*best, *self.untouched))}
        for folder in saved_checkpoints(self.folder):
            if folder not in kept:  # later ones too: they were damaged, or the run would have gone on from there
                shutil.rmtree(folder, ignore_errors=True)


def score_at(stage: TrainStage, step: int) -> float | None:
    """Return the loss that was measured at `step`, if it was, and is a number."""
    if stage.score is None or stage.score[0] != step or not math.isfinite(stage.score[1]):
        return None
    return stage.score[1]


def scores_of(folder: Path) -> tuple[dict[int, float], set[int]]:
    """Return the losses that the checkpoints under `folder` hold, by step, and the steps of which that is not known.

    Those cannot be read now; damaged ones are in neither.
    """
    found, unknown = {}, set()
    for place in saved_checkpoints(folder):
        try:
            score = read_state(place).get(SCORE)
        except UnreadableError as error:
            log.warning("%s; it stays where it is", error)
            unknown.add(step_of(place))
            continue
        except DataError:
            continue
        if score is not None:
            found[step_of(place)] = float(score)
    return found, unknown


class GracefulStop(StepCallback):
    """On Ctrl-C, SIGTERM or a scheduler's SIGUSR1 or 2, finish the step, save, and stop; a second Ctrl-C stops at once.

    The ranks agree at the end of each step, so that all stop at the same one, whichever of them was told. In the last
    step, and after it, an export is what is left, which asks as well (`Export`).

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
            # asks from CPU to CPU, so that no device has to wait
            self.group = dist.new_group(backend="gloo", timeout=self.checkpoint.timeout)
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, *slurm.SIGNALS):
                self.before[number] = signal.signal(number, self.handle)

    def handle(self, number: int, frame: Any) -> None:
        """Take note of the signal. Schedulers send SIGTERM several times; only a person means the second one."""
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step(self, trainer: L.Trainer, stage: TrainStage) -> None:
        if self.agreed():
            if trainer.is_global_zero:
                log.info("stopping after step %d (signal %d): saving a checkpoint", self.step, self.received)
            if self.step < stage.max_steps:  # else the last one is saved in any case
                self.checkpoint.save(trainer, wait=True)
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
