"""The autoencoder's last stage, small enough to train in a blink: a frozen encoder, a decoder and a discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny_training import SGDFactory, Spy
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from soratrain.batch import VideoBatch, draw_of
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.models import weights
from soratrain.models.discriminator import PatchDiscriminator
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.vae import VAEStage
from soratrain.stages.vae_adversary import Adversary

SAMPLES = 8  # of an optimizer step
LAYOUT: dict[str, Any] = {"channels": [8, 8], "time_strides": [2], "space_strides": [2], "front_strides": [2, 4]}
LAYOUT |= {"encoder_blocks": [0, 1], "decoder_blocks": [0, 1], "time_kernels": [1, 3]}
NET = partial(VAE, latent_channels=4, **LAYOUT)


def clips(index: int, per_micro: int) -> VideoBatch:
    """Return micro-batch `index`; a step has the same samples, however many are in a micro-batch."""
    numbers = range(index * per_micro, (index + 1) * per_micro)
    frames = 1 + 4 * (numbers[0] // SAMPLES % 3)
    shares = torch.arange(1, SAMPLES + 1) / (SAMPLES * (SAMPLES + 1) / 2)
    random = [torch.Generator().manual_seed(number) for number in numbers]
    videos = [torch.randint(0, 256, (frames, 32, 32, 3), dtype=torch.uint8, generator=source) for source in random]
    return VideoBatch(
        keys=tuple(map(str, numbers)),
        captions=("",) * per_micro,
        fps=torch.full((per_micro,), 8.0),
        weights=shares[[number % SAMPLES for number in numbers]],
        draws=torch.tensor([draw_of(0, number) for number in numbers]),
        scale=float(SAMPLES // per_micro),
        video=torch.stack(videos),
    )


class Micro(IterableDataset):
    def __init__(self, first: int, last: int, per_micro: int, rank: int, ranks: int) -> None:
        self.numbers, self.per_micro = range(first + rank, last, ranks), per_micro

    def __iter__(self) -> Iterator[VideoBatch]:
        return (clips(index, self.per_micro) for index in self.numbers)

    def __len__(self) -> int:
        return len(self.numbers)


class Data(L.LightningDataModule):
    """Counts the micro-batches that the optimizers have used, over all ranks."""

    def __init__(self, *, per_micro: int, max_steps: int) -> None:
        super().__init__()
        self.per_micro, self.max_steps, self.consumed = per_micro, max_steps, 0

    def train_dataloader(self) -> DataLoader:
        last, trainer = self.max_steps * SAMPLES // self.per_micro, self.trainer
        micro = Micro(self.consumed, last, self.per_micro, trainer.global_rank, trainer.world_size)
        return DataLoader(micro, batch_size=None)

    def transfer_batch_to_device(self, batch: VideoBatch, device: torch.device, dataloader_idx: int) -> VideoBatch:
        return batch.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {"consumed": self.trainer.global_step * SAMPLES // self.per_micro}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.consumed = state["consumed"]


class Poisoned(VAEStage):
    """`poison` says by step what rank 0 finds to be NaN: its `rebuilt` pixels, or the `real` ones."""

    poison: dict[int, str]

    def play(self, batch: VideoBatch, x: Tensor, y: Tensor, divergence: Tensor) -> None:
        spoilt = self.poison.get(self.global_step, "") if self.global_rank == 0 else ""
        if spoilt == "rebuilt":
            y = y * float("nan")
        real = x * float("nan") if spoilt == "real" else x
        judge = self.adversary.judge
        self.adversary.judge = lambda disc, batch, _, shown: judge(disc, batch, real, shown)
        super().play(batch, x, y, divergence)
        self.adversary.judge = judge


def begun(folder: Path) -> Path:
    """Return a folder with the weights of an autoencoder that has some statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        vae = NET()
        for parameter in vae.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
        vae.set_statistics(torch.randn(4), torch.cov(torch.randn(4, 50)))
    weights.save(folder / "weights", "vae", vae, NET, {})
    return folder


def train(
    out: str | Path,
    *,
    begin: str | Path | None = None,
    strategy: str = "single",
    ranks: int = 1,
    per_micro: int = 4,
    max_steps: int = 6,
    stop_at: int = 0,
    optimizer: str = "adamw",
    precision: str = "32-true",
    clip: float = 0.5,
    log_every: int = 1,
    checkpoint_every: int = 2,
    poison: dict[int, str] | None = None,
    max_bad_steps: int = 2,
    adversary: dict[str, Any] | None = None,
) -> VAEStage:
    """Train decoder against discriminator, of the encoder in `begin` if that is given, else all of a new autoencoder.

    `stop_at` ends early, as a kill would.
    """
    L.seed_everything(1, verbose=False)
    make = SGDFactory if optimizer == "sgd" else partial(OptimizerFactory, name=optimizer)
    stage = Poisoned(
        net=NET,
        optimizer=make(lr=0.01, clip=clip, weight_decay=0.0, disc=make(lr=0.02, clip=clip, weight_decay=0.0)),
        schedule=Schedule(name="cosine", warmup_steps=2),
        max_steps=max_steps,
        freeze_encoder=begin is not None,
        max_bad_steps=max_bad_steps,
        kl_weight=1e-3,
        adversary=Adversary(
            net=partial(PatchDiscriminator, channels=[8, 8], time_strides=[1, 2]),
            **{"start": 0.2, "warmup": 0.3, "lecam": 0.1, **(adversary or {})},
        ),
    )
    stage.poison = poison or {}
    if begin is not None:
        stage.start_from("vae", begin)
    else:
        stage.finalize = lambda: None  # type: ignore[method-assign]  # these data have no more clips to measure
    trainer = build_trainer(
        out=out,
        max_steps=stop_at or max_steps,
        strategy=StrategyOptions(name=strategy),
        accelerator="cpu",
        devices=ranks,
        accumulate=SAMPLES // per_micro // ranks,
        clip=clip,
        ema=0.9,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        precision=precision,
        callbacks=[Spy(Path(out) / "whole.pt")],
    )
    fit(trainer, stage, Data(per_micro=per_micro, max_steps=max_steps))
    return stage
