"""What watching a run and averaging its weights cost: steps of dit=tiny with all of it, and with nothing, in turn.

With: the watchdog, the weight average, metrics with the throughput monitor every ten steps, the progress line, the
stage's reports. Without: a bare Lightning trainer, and a stage that reports nothing. Each runs in turn in the same
process; the first steps of each turn are not counted. The process's CPU time tells the cost apart from what else the
machine does; nothing here waits for a disk or a device.
"""

from __future__ import annotations

import itertools
import random
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import lightning as L
import torch
from data_tiny import write_latents
from lightning.pytorch.strategies import SingleDeviceStrategy

from soratrain.callbacks.checkpoint import Checkpoint, GracefulStop
from soratrain.callbacks.ema import EMA
from soratrain.data.datamodule import LatentData
from soratrain.diffusion.flow import Flow
from soratrain.distributed.trainer import build_trainer, quieten
from soratrain.models.dit import DiT
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

TITLE = "Steps of dit=tiny (3.5 M parameters, AdamW, fp32, one thread) on a CPU, milliseconds"
ROUNDS, STEPS, WARM = 5, 22, 4
SHAPES = [(48, 64, 9), (64, 48, 9), (48, 48, 5), (64, 64, 1)] * 64
CHANNELS = 16
WAYS = ("nothing", "weights averaged", "monitor", "monitor, weights averaged")


class Timer(L.Callback):
    """Notes wall and CPU seconds from the beginning of each step to that of the next."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.marks.append((time.perf_counter(), time.process_time()))


class Silent(DiTStage):
    """Reports nothing."""

    def report(self, **values: Any) -> None:
        return

    def report_captions(self, batch: Any) -> None:
        return


def trainer(way: str, out: Path, timer: Timer) -> L.Trainer:
    """Return a trainer of a way."""
    if "monitor" not in way:
        return L.Trainer(
            accelerator="cpu", strategy=SingleDeviceStrategy(torch.device("cpu")), max_steps=STEPS, max_epochs=-1,
            gradient_clip_val=1.0, logger=False, callbacks=[timer], enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, use_distributed_sampler=False,
        )  # fmt: skip
    built = build_trainer(
        out=out,
        max_steps=STEPS,
        accelerator="cpu",
        clip=1.0,
        ema=0.999 if "averaged" in way else 0.0,
        callbacks=[timer],
    )
    kept = (Checkpoint, GracefulStop)  # they write, and are no part of what is measured
    built.callbacks = [callback for callback in built.callbacks if not isinstance(callback, kept)]  # type: ignore[attr-defined]
    return built


def steps(way: str, latents: Path) -> list[tuple[float, float]]:
    """Train some steps; return wall and CPU seconds of each."""
    L.seed_everything(1, verbose=False)
    stage = (DiTStage if "monitor" in way else Silent)(
        dit=partial(
            DiT, channels=CHANNELS, dim=192, depth=6, num_heads=3, text_dim=128, patch=[1, 2, 2], mlp_ratio=3.0
        ),
        text=partial(ByteTextEncoder, dim=128, depth=1, num_heads=4, mlp_ratio=2.0, table=2048, max_tokens=256),
        objective=Flow(),
        optimizer=OptimizerFactory(name="adamw", lr=1e-4),
        schedule=Schedule(warmup_steps=0),
        max_steps=STEPS + 1,  # not at the end: nothing is exported
    )
    data = LatentData(latents=str(latents), seed=3, max_steps=STEPS, tokens_per_batch=1728, quadratic=1e-3)
    timer = Timer()
    with tempfile.TemporaryDirectory() as out:
        built = trainer(way, Path(out), timer)
        if way == "weights averaged":
            built.callbacks.append(BareEMA(0.999))  # type: ignore[attr-defined]
        built.fit(stage, datamodule=data)
        for callback in built.callbacks:  # type: ignore[attr-defined]
            getattr(callback, "part", lambda wait: None)(wait=False)
    pairs = itertools.pairwise(timer.marks)
    return [(b[0] - a[0], b[1] - a[1]) for a, b in pairs][WARM:]


class BareEMA(EMA):
    """The average under a strategy that knows nothing of it."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from soratrain.distributed.fragments import whole_fragments

        self.fragments = [item for item in whole_fragments(pl_module.named_parameters()) if item.trained]
        self.averages = [item.read().float().clone() for item in self.fragments]


def measure() -> list[dict[str, str]]:
    """Return the rows of the table."""
    quieten()
    torch.set_num_threads(1)
    found: dict[str, list[list[tuple[float, float]]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        latents = write_latents(Path(folder) / "latents", SHAPES, channels=CHANNELS)
        steps(WAYS[0], latents)  # the first of a process is slower
        for turn in range(ROUNDS):
            for way in random.Random(turn).sample(WAYS, len(WAYS)):
                found[way].append(steps(way, latents))
    rows = []
    for way in WAYS:
        row = {"beside the step": way}
        for name, place in (("CPU", 1), ("wall", 0)):
            each = [median(step[place] for step in turn) for turn in found[way]]
            bare = [median(step[place] for step in turn) for turn in found[WAYS[0]]]
            ratios = [one / other - 1 for one, other in zip(each, bare, strict=True)]
            row[f"{name}, ms"] = shown([1e3 * value for value in each], "{:.1f}")
            row[f"{name}, added"] = "" if way == WAYS[0] else shown(ratios, "{:+.1%}")
        rows.append(row)
    return rows


def shown(values: list[float], form: str) -> str:
    """Return median, least and most."""
    return f"{form.format(median(values))} ({form.format(min(values))} to {form.format(max(values))})"
