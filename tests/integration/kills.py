"""A run of the DiT on planned data that is killed at a given moment and goes on, beside one that is not.

The processes are started as a launcher would, but by nobody who would end the others when one dies.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning as L

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

from data_tiny import write_latents
from ranks import run_ranks
from tiny_dit import SHAPES, train

from soratrain.callbacks.metrics import NOT_REPEATABLE, read_rows
from soratrain.distributed.checkpoint import latest_checkpoint
from soratrain.distributed.saving import Saver
from soratrain.models import tensor_file

EVERY = 3  # steps between checkpoints
ANY_STEP = ("before a batch", "after the backward pass", "after the update")
SAVING = ("half a file written", "its file written", "folder renamed")


@dataclass(frozen=True)
class Kill:
    """Where a run is ended by SIGKILL.

    Attributes:
        rank: that is killed.
        step: that it is in, counted from 1; a moment of SAVING is of the checkpoint that is made at that step's end.
        moment: one of ANY_STEP, or of SAVING.
    """

    rank: int
    step: int
    moment: str


class Killer(L.Callback):
    """Kills this process where it is told to, and writes down which samples each step has seen."""

    def __init__(self, out: Path, attempt: int, kill: Kill | None) -> None:
        self.out, self.attempt, self.kill = out, attempt, kill

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self.seen = (self.out / f"seen-{trainer.global_rank}.jsonl").open("a")
        if self.kill and self.kill.rank != trainer.global_rank:
            self.kill = None
        if self.kill and self.kill.moment in SAVING:
            self.kill_in_saving(self.kill)

    def kill_in_saving(self, kill: Kill) -> None:
        """Let the writing of the checkpoint of `kill.step` be the end."""
        write, finish, folder = tensor_file.write, Saver.write, f"step-{kill.step:08d}"

        def half(path: Path, header: bytes, pieces: Any, *more: Any) -> tuple[int, int]:
            def halves() -> Iterator[memoryview]:
                for piece in pieces:
                    yield piece[: len(piece) // 2]
                    os.sync()
                    self.now()

            mine = folder in path.parent.name and kill.moment == "half a file written"
            found = write(path, header, halves() if mine else pieces, *more)
            if folder in path.parent.name and kill.moment == "its file written":
                self.now()
            return found

        def whole(saver: Saver, save: Any, group: Any) -> None:
            finish(saver, save, group)
            if save.folder.name == folder and kill.moment == "folder renamed":
                self.now()

        tensor_file.write, Saver.write = half, whole  # type: ignore[assignment, method-assign]

    def now(self) -> None:
        """Die."""
        (self.out / "killed").write_text(str(time.time()))
        os.kill(os.getpid(), signal.SIGKILL)

    def at(self, trainer: L.Trainer, moment: str, step: int) -> None:
        if self.kill and (self.kill.moment, self.kill.step) == (moment, step):
            self.now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.at(trainer, "before a batch", trainer.global_step + 1)
        self.seen.write(json.dumps([self.attempt, trainer.global_step + 1, batch.keys]) + "\n")
        self.seen.flush()

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.at(trainer, "after the backward pass", trainer.global_step + 1)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.at(trainer, "after the update", trainer.global_step)


def once(out: str, attempt: int = 1, kill: dict[str, Any] | None = None, **settings: Any) -> None:
    """Train in this process. `attempt` counts the starts of a run."""
    killer = Killer(Path(out), attempt, Kill(**kill) if kill else None)
    Path(out).mkdir(parents=True, exist_ok=True)
    train(out, checkpoint_every=EVERY, every=4, levels=2, callbacks=[killer], **settings)


def latents(folder: Path) -> str:
    """Write the data of all runs."""
    return str(write_latents(folder, SHAPES))


def whole(out: Path, data: str, *, ranks: int, strategy: str, **settings: Any) -> None:
    """Train, or go on, to the end."""
    run_ranks(once, ranks, out=str(out), latents=data, ranks=ranks, strategy=strategy, **settings)


def broken(out: Path, data: str, kill: Kill, *, ranks: int, strategy: str, **settings: Any) -> tuple[str, float]:
    """Train until the kill; return the checkpoint that is left, and the seconds until the last process had ended."""
    try:
        run_ranks(
            once, ranks, out=str(out), latents=data, ranks=ranks, strategy=strategy, kill=asdict(kill), **settings
        )
    except RuntimeError as error:
        if f"rank {kill.rank} died with exit code -9" not in str(error):
            raise
    else:
        raise AssertionError(f"{kill} did not happen")
    ended = time.time() - float((out / "killed").read_text())
    newest = latest_checkpoint(out / "checkpoints")
    return newest.name if newest else "none", ended


def curve(out: Path) -> list[dict[str, str]]:
    """Return the rows of metrics as they are written, less those that time decides."""
    rows = read_rows(out / "metrics.csv")
    return [{key: value for key, value in row.items() if key not in NOT_REPEATABLE} for row in rows]


def samples(out: Path) -> dict[int, list[list[str]]]:
    """Return the micro-batches of each step as they counted in the end, whichever rank had them."""
    lines = [json.loads(line) for file in out.glob("seen-*.jsonl") for line in file.read_text().splitlines()]
    newest: dict[int, int] = {}
    for attempt, step, _ in lines:
        newest[step] = max(attempt, newest.get(step, 0))
    found: dict[int, list[list[str]]] = {}
    for attempt, step, keys in lines:
        if attempt == newest[step]:
            found.setdefault(step, []).append(keys)
    return {step: sorted(batches) for step, batches in sorted(found.items())}


def identical(left: Path, right: Path) -> bool:
    """Return whether two runs have the same losses, samples and last checkpoint, bit for bit."""
    one, other = (latest_checkpoint(run / "checkpoints") for run in (left, right))
    assert one and other
    files = sorted(path.name for path in one.iterdir())
    return (
        curve(left) == curve(right)
        and samples(left) == samples(right)
        and one.name == other.name
        and files == sorted(path.name for path in other.iterdir())
        and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    )
