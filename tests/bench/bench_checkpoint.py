"""How long a checkpoint holds up the training of a model of 300 million parameters, written beside it or not.

One run trains without a break; in turn, a number of its steps are timed with no checkpoint, with one that training
waits for, and with one that is written beside it (whose end the last of these steps waits for). What a checkpoint costs
is what its steps take more than those without: the copy, the cores and the memory that writing takes away, all of it.
The disk's own speed is that of writing the same number of bytes and having the disk keep them.
"""

from __future__ import annotations

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
from soratrain.distributed.checkpoint import folder_of
from soratrain.distributed.trainer import build_trainer, fit
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

WIDTH, DEPTH, ROWS = 2048, 72, 128
ROUNDS, BLOCK, WARM = 5, 8, 3  # BLOCK steps are timed together
NONE, WAITS, BESIDE = "none", "training waits for it", "beside training"
TITLE = (
    f"A checkpoint of {DEPTH * WIDTH * (WIDTH + 1) / 1e6:.0f} million parameters (weights, two moments, average: fp32)"
    " on a CPU, two threads"
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

    def __init__(self, out: Path) -> None:
        self.out = out
        self.turns = [kind for _ in range(ROUNDS) for kind in (NONE, WAITS, BESIDE)]
        self.took: dict[str, list[float]] = {NONE: [], WAITS: [], BESIDE: [], "call": [], "disk": []}
        self.began = 0.0
        self.nbytes = 0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        at = trainer.global_step - WARM
        saver = next(item for item in trainer.callbacks if isinstance(item, Checkpoint)).saver  # type: ignore[attr-defined]
        if at < 0 or at > BLOCK * len(self.turns):
            return
        saver.decided = True  # to write beside training, however much of the memory other programs have
        if at % BLOCK == 0:
            if at:
                saver.wait()
                self.took[self.turns[at // BLOCK - 1]].append(time.perf_counter() - self.began)
            self.tidy()
            if at == BLOCK * len(self.turns):
                return
            kind = self.turns[at // BLOCK]
            self.began = time.perf_counter()
            if kind != NONE:
                folder = folder_of(self.out, trainer.global_step)
                trainer.save_checkpoint(folder, storage_options={"wait": kind == WAITS})
                if kind == BESIDE:
                    self.took["call"].append(time.perf_counter() - self.began)
        else:
            saver.poll()

    def tidy(self) -> None:
        """Measure the disk alone after each checkpoint, and remove that."""
        for folder in self.out.glob("step-*"):
            self.nbytes = sum(file.stat().st_size for file in folder.iterdir())
            shutil.rmtree(folder)
            self.took["disk"].append(disk(self.out / "plain", self.nbytes))


def disk(path: Path, nbytes: int) -> float:
    """Return the seconds that writing so many bytes takes, until the disk keeps them."""
    chunk = memoryview(os.urandom(1 << 22))
    began = time.perf_counter()
    with path.open("wb") as file:
        for start in range(0, nbytes, len(chunk)):
            file.write(chunk[: nbytes - start])
        file.flush()
        os.fsync(file.fileno())
    took = time.perf_counter() - began
    path.unlink()
    return took


def spread(values: list[float], digits: int = 2) -> str:
    """Return the median (least to most)."""
    return f"{median(values):.{digits}f} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def measure() -> list[dict[str, str]]:
    """Return the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    steps = WARM + BLOCK * 3 * ROUNDS + 1
    try:
        with tempfile.TemporaryDirectory(dir=Path(__file__).parent) as place:
            clock = Clock(Path(place))
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
        torch.set_num_threads(threads)
    took, nbytes = clock.took, clock.nbytes
    more = {kind: [a - b for a, b in zip(took[kind], took[NONE], strict=True)] for kind in (WAITS, BESIDE)}
    shares = [b / a for a, b in zip(more[WAITS], more[BESIDE], strict=True)]

    def rates(seconds: list[float]) -> str:
        return spread([nbytes / 1e6 / max(value, 1e-3) for value in seconds], 0)

    step = median(took[NONE]) / BLOCK
    return [
        {
            "written": "the same bytes, by the disk alone",
            "seconds": spread(took["disk"]),
            "MB/s": rates(took["disk"]),
            "note": f"{nbytes / 1e9:.2f} GB; a step takes {step:.2f} s",
        },
        {
            "written": WAITS,
            "seconds": spread(more[WAITS]),
            "MB/s": rates(more[WAITS]),
            "note": f"what {BLOCK} steps with it take more than {BLOCK} without",
        },
        {
            "written": BESIDE,
            "seconds": spread(more[BESIDE]),
            "MB/s": rates(more[BESIDE]),
            "note": f"the same; of it the copy, for which the step waits, {spread(took['call'])} s",
        },
        {"written": "beside / waits", "seconds": spread(shares), "MB/s": "", "note": "goal: at most 0.33"},
    ]
