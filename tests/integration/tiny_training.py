"""A stage and data small enough to train in a blink, for tests of the training engine.

Run as a script it trains in as many processes as it is told: `python tiny_training.py '{"out": …, "strategy": …}'`.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from soratrain.callbacks.export import Whole
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

SIZE, BATCH = 6, 4


@dataclass(frozen=True)
class Numbers:
    """A micro-batch; frozen, as the real ones are."""

    values: Tensor

    def to(self, device: Any, non_blocking: bool = False) -> Numbers:
        return Numbers(self.values.to(device))


class Net(nn.Module):
    """Matrices, a convolution, vectors, a number, a buffer, and a layer that its parent initializes."""

    def __init__(self, *, width: int = 10) -> None:
        super().__init__()
        self.enter = nn.Linear(SIZE, width)
        self.norm = nn.LayerNorm(width)
        self.conv = nn.Conv1d(1, 2, 3, padding=1)
        self.leave = nn.Linear(2 * width, SIZE)
        self.gain = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("scale", torch.ones(SIZE))
        nn.init.constant_(self.leave.weight, 0.1)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.norm(self.enter(x)).unsqueeze(1)).flatten(1)
        return self.leave(torch.tanh(hidden)) * self.gain * self.scale


class SGDFactory(OptimizerFactory):
    """Plain gradient descent, which shows any factor that AdamW would hide."""

    def _build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.lr)


class TinyError(Exception):
    """What a mistake in the code raises."""


def suffer(fault: str) -> None:
    """Do to this process what `fault` says."""
    if fault == "raise":
        raise TinyError("a mistake in the code")
    if fault == "sleep":
        time.sleep(1000)
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[fault])


class Stage(TrainStage):
    """Learns to reverse its input.

    `poison` is a step whose loss is NaN, `interrupt` one that signals this process, and `fault` says what befalls the
    rank `fault_rank` at step `fault_step`. Each micro-batch takes `pause` seconds.
    """

    def __init__(
        self,
        *,
        poison: int = -1,
        interrupt: int = -1,
        fault: str = "",
        fault_rank: int = 1,
        fault_step: int = 3,
        pause: float = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.poison, self.interrupt = poison, interrupt
        self.fault, self.fault_rank, self.fault_step = fault, fault_rank, fault_step
        self.pause = pause

    def training_step(self, batch: Numbers, batch_idx: int) -> Tensor:
        values = batch.values
        time.sleep(self.pause)
        if self.fault and (self.global_rank, self.global_step) == (self.fault_rank, self.fault_step):
            suffer(self.fault)
        if self.global_step == self.interrupt and self.global_rank == 0:
            self.interrupt = -1
            os.kill(os.getpid(), signal.SIGTERM)
        loss = (self.net(values) - values.flip(1)).square().mean()
        if self.global_step == self.poison:
            loss = loss * float("nan")
        self.report(loss=loss, tokens=values.numel(), samples=len(values))
        return loss

    def finalize(self) -> None:
        """Keep what the final weights compute, as a stage does that measures its own outputs at the end."""
        with torch.no_grad():
            self.net.scale.copy_(self.net(torch.ones(1, SIZE))[0])


class Micro(IterableDataset):
    """Micro-batches `first` to `last` of an endless sequence; rank r of R gets every R-th."""

    def __init__(self, first: int, last: int, rank: int, ranks: int, late: int = -1) -> None:
        self.first, self.last, self.rank, self.ranks, self.late = first, last, rank, ranks, late

    def __iter__(self) -> Iterator[Numbers]:
        for index in range(self.first + self.rank, self.last, self.ranks):
            if index == self.late:
                suffer("sleep")
            yield Numbers(torch.randn(BATCH, SIZE, generator=torch.Generator().manual_seed(index)))

    def __len__(self) -> int:
        return (self.last - self.first) // self.ranks


class Data(L.LightningDataModule):
    """Counts the micro-batches that the optimizer has used, over all ranks."""

    def __init__(self, *, per_step: int, max_steps: int, late: int = -1) -> None:
        super().__init__()
        self.per_step, self.max_steps, self.consumed, self.late = per_step, max_steps, 0, late

    def train_dataloader(self) -> DataLoader:
        ranks = self.trainer.world_size
        return DataLoader(
            Micro(self.consumed, self.per_step * self.max_steps, self.trainer.global_rank, ranks, self.late),
            batch_size=None,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.trainer.global_step * self.per_step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


def train(
    out: str | Path,
    *,
    strategy: str = "single",
    ranks: int = 1,
    per_step: int = 4,
    max_steps: int = 5,
    optimizer: str = "adamw",
    lr: float = 0.01,
    clip: float = 0.0,
    clip_adaptive: float = 0.0,
    ema: float = 0.0,
    log_every: int = 1,
    checkpoint_every: int = 2,
    keep: int = 2,
    precision: str = "32-true",
    stop_at: int = 0,
    weight_decay: float = 0.01,
    width: int = 10,
    weights: str = "fp32",
    reduce: str = "fp32",
    stall_minutes: float = 10.0,
    timeout_minutes: float = 30.0,
    num_nodes: int = 1,
    late: int = -1,
    callbacks: Sequence[L.Callback] = (),
    trainer: Mapping[str, Any] | None = None,
    **stage: Any,
) -> tuple[L.Trainer, Stage, dict[str, float]]:
    """Train the tiny stage; return trainer, stage and last metrics. `stop_at` ends early, as a kill would.

    What build_trainer takes beyond the arguments here, `trainer` holds.
    `late` is a micro-batch for which its rank waits for ever.
    """
    L.seed_everything(1, verbose=False)
    factory = (
        SGDFactory(lr=lr, weight_decay=0.0, clip=clip, clip_adaptive=clip_adaptive)
        if optimizer == "sgd"
        else OptimizerFactory(name=optimizer, lr=lr, clip=clip, clip_adaptive=clip_adaptive, weight_decay=weight_decay)
    )
    module = Stage(
        nets={"net": partial(Net, width=width)},
        optimizer=factory,
        schedule=Schedule(name="cosine", warmup_steps=2),
        max_steps=max_steps,
        **stage,
    )
    built = build_trainer(
        out=out,
        max_steps=stop_at or max_steps,
        strategy=StrategyOptions(name=strategy, weights=weights, reduce=reduce, timeout_minutes=timeout_minutes),
        accelerator="cpu",
        devices=ranks,
        accumulate=per_step // ranks,
        clip=clip,
        ema=ema,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        keep=keep,
        precision=precision,
        stall_minutes=stall_minutes,
        num_nodes=num_nodes,
        callbacks=[Spy(Path(out) / "whole.pt"), *callbacks],
        **(trainer or {}),
    )
    data = Data(per_step=per_step, max_steps=max_steps, late=late)
    return built, module, fit(built, module, data)


class Spy(L.Callback):
    """Keeps the whole weights at the end of training."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = Whole(trainer)
        state = dict(whole.tensors(sorted(whole.forms)))
        if trainer.is_global_zero:
            torch.save(state, self.file)


class Measured(L.Callback):
    """Stands for a validation: the loss on held-out clips at some steps."""

    def __init__(self, losses: Mapping[int, float], **_: Any) -> None:
        self.losses = losses

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        if trainer.global_step in self.losses:
            pl_module.score = (trainer.global_step, self.losses[trainer.global_step])


def main(settings: Mapping[str, Any]) -> None:
    """Train as the command line would, errors and exit codes included."""
    from soratrain.__main__ import ending

    logging.basicConfig(level=logging.WARNING)
    sys.exit(ending(lambda: train(**settings) and 0))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(json.loads(sys.argv[1]))
