"""How long a checkpoint holds up the training of a model of 300 million parameters, written beside it or not.

One run trains without a break; in turn, a number of its steps are timed with no checkpoint, with the same tensors
written by `torch.save` and kept by the disk, with a checkpoint that training waits for, and with one that is written
beside it (whose end the last of these steps waits for). "Stands still" is the time for which a checkpoint holds up the
step that it comes after; "adds" is all that it costs, what the steps take more than those without: the copy, the cores
and the memory that writing takes away from them. On two threads training leaves no core of two to the writer; on one it
does, as training on a GPU does. The disk's own speed is that of writing the same number of bytes past the page cache.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from tiny_training import Data, Numbers

from soratrain.callbacks.checkpoint import Checkpoint
from soratrain.callbacks.ema import EMA
from soratrain.distributed.checkpoint import folder_of
from soratrain.distributed.fit import fit
from soratrain.distributed.trainer import build_trainer
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

WIDTH, DEPTH, ROWS = 2048, 72, 128
ROUNDS, WARM = 3, 3
BLOCKS = {2: 8, 1: 5}  # steps that are timed together, by the threads that train: longer than writing takes
NONE, PLAIN, WAITS, BESIDE = "none", "torch.save, training waits", "ours, training waits", "ours, beside training"
TITLE = (
    f"A checkpoint of {DEPTH * WIDTH * (WIDTH + 1) / 1e6:.0f} million parameters (weights, two moments, average: fp32)"
    " on a CPU"
)


class Net(nn.Module):
    """Linear layers with residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) / DEPTH
        return x


class Stage(TrainStage):
    """Learns to turn its input round."""

    def training_step(self, batch: Numbers, batch_idx: int) -> Tensor:
        x = batch.values.repeat(ROWS, WIDTH)[:ROWS, :WIDTH]
        loss = (self.net(x) - x.flip(1)).square().mean()
        self.report(loss=loss)
        return loss


class Clock(L.Callback):
    """Times blocks of steps; at the first step of each a checkpoint is made, or none."""

    def __init__(self, out: Path, block: int) -> None:
        self.out, self.block = out, block
        self.turns = [kind for _ in range(ROUNDS) for kind in (NONE, PLAIN, WAITS, BESIDE)]
        self.took: dict[str, list[float]] = {NONE: [], PLAIN: [], WAITS: [], BESIDE: [], "disk": []}
        self.stood: dict[str, list[float]] = {PLAIN: [], WAITS: [], BESIDE: []}
        self.began = 0.0
        self.nbytes = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        at = trainer.global_step - WARM
        saver = next(item for item in trainer.callbacks if isinstance(item, Checkpoint)).saver  # type: ignore[attr-defined]
        if at < 0 or at > self.block * len(self.turns):
            return
        saver.decided = True  # to write beside training, however much of the memory other programs have
        if at % self.block == 0:
            if at:
                saver.wait()
                self.took[self.turns[at // self.block - 1]].append(time.perf_counter() - self.began)
            self.tidy()
            if at == self.block * len(self.turns):
                return
            kind = self.turns[at // self.block]
            self.began = time.perf_counter()
            if kind == PLAIN:
                self.plain(trainer, pl_module)
            elif kind != NONE:
                folder = folder_of(self.out, trainer.global_step)
                trainer.save_checkpoint(folder, storage_options={"wait": kind == WAITS})
            if kind != NONE:
                self.stood[kind].append(time.perf_counter() - self.began)
        else:
            saver.poll()

    def plain(self, trainer: L.Trainer, stage: L.LightningModule) -> None:
        """Write what a checkpoint holds as is mostly done."""
        ema = next(item for item in trainer.callbacks if isinstance(item, EMA))  # type: ignore[attr-defined]
        state = {"optimizer": trainer.optimizers[0].state_dict(), "average": ema.averages}
        with (self.out / "plain.pt").open("wb") as file:
            torch.save({"weights": stage.state_dict(), **state}, file)
            file.flush()
            os.fsync(file.fileno())

    def tidy(self) -> None:
        """Measure the disk alone after each checkpoint, and remove that."""
        (self.out / "plain.pt").unlink(missing_ok=True)
        for folder in self.out.glob("step-*"):
            self.nbytes = sum(file.stat().st_size for file in folder.iterdir())
            shutil.rmtree(folder)
            self.took["disk"].append(disk(self.out / "plain", self.nbytes))


def disk(path: Path, nbytes: int) -> float:
    """Return the seconds that writing so many bytes takes, past the page cache, until the disk keeps them."""
    chunk = mmap.mmap(-1, 1 << 22)  # page-aligned, as O_DIRECT wants it
    chunk[:] = os.urandom(len(chunk))
    began = time.perf_counter()
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
    for _ in range(nbytes // len(chunk)):
        os.write(file, chunk)
    os.fsync(file)
    os.close(file)
    took = time.perf_counter() - began
    path.unlink()
    return took


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median (least to most)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def run(threads: int) -> Clock:
    """Train on so many threads; return what was timed."""
    steps = WARM + BLOCKS[threads] * 4 * ROUNDS + 1
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as place:
            clock = Clock(Path(place), BLOCKS[threads])
            stage = Stage(
                nets={"net": partial(Net)},
                optimizer=OptimizerFactory(lr=1e-4),
                schedule=Schedule(),
                max_steps=steps + 1,
            )
            trainer = build_trainer(
                out=place, max_steps=steps, accelerator="cpu", ema=0.99, checkpoint_every=0, callbacks=[clock]
            )
            fit(trainer, stage, Data(per_step=1, max_steps=steps))
    finally:
        torch.set_num_threads(before)
    return clock


def measure() -> list[dict[str, str]]:
    """Return the table."""
    rows = []
    for threads, block in BLOCKS.items():
        clock = run(threads)
        took, stood = clock.took, clock.stood
        adds = {kind: [a - b for a, b in zip(took[kind], took[NONE], strict=True)] for kind in (PLAIN, WAITS, BESIDE)}

        def against(values: dict[str, list[float]], kind: str) -> str:
            return spread([a / b for a, b in zip(values[kind], values[PLAIN], strict=True)])

        step = f"{threads} thread{'s' * (threads > 1)}, {median(took[NONE]) / block:.2f} s a step"
        for kind in (PLAIN, WAITS, BESIDE):
            rows.append(
                {
                    "training on": step,
                    "written by": kind,
                    "stands still, s": spread(stood[kind]),
                    "by torch.save": against(stood, kind),
                    "adds, s": spread(adds[kind]),
                    "by torch.save's": against(adds, kind),
                    "MB/s": spread([clock.nbytes / 1e6 / value for value in stood[kind]], 0),
                }
            )
        rows.append(
            {
                "training on": step,
                "written by": f"the disk alone, {clock.nbytes / 1e9:.2f} GB",
                "stands still, s": spread(took["disk"]),
                "MB/s": spread([clock.nbytes / 1e6 / value for value in took["disk"]], 0),
            }
        )
    return rows
