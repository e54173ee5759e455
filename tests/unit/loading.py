"""What the loader's tests share: data modules over tiny shards, and a net so small that its training is the order."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import torch

from soratrain.data.buckets import Native
from soratrain.data.datamodule import LatentData, VideoData
from soratrain.data.reading import read_manifest

SHAPES = [(32, 32, 9)] * 9 + [(32, 48, 9)] * 5 + [(32, 32, 1)] * 6


def video(clips: str, **options) -> VideoData:
    return VideoData(**{"shards": clips, "buckets": Native(), "seed": 3, "max_steps": 8, "batch_size": 2} | options)


def cached(latents: str, **options) -> LatentData:
    return LatentData(**{"latents": latents, "seed": 3, "max_steps": 8, "batch_size": 2} | options)


def same(one, other) -> bool:
    fields = vars(one).keys() - {"video", "latents", "text"}
    payloads = [[batch.video] if hasattr(batch, "video") else [*batch.latents, *batch.text] for batch in (one, other)]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in [
            *((getattr(one, name), getattr(other, name)) for name in fields),
            *zip(*payloads, strict=True),
        ]
    )


class Toy(L.LightningModule):
    """Learns each sample's mean; remembers what it saw in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 0.3)
        torch.nn.init.constant_(self.layer.bias, 0.1)
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch, batch_idx):
        self.seen += [(self.trainer.global_step, name) for name in batch.keys]
        x = torch.stack([latent.mean() / 20 for latent in batch.latents])[:, None]
        target = torch.stack([noise.sum() for noise in batch.normal("noise", [(1,)] * len(batch))])
        return batch.mean((self.layer(x)[:, 0] - target) ** 2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class StopAt(L.Callback):
    """Stops a run after a number of finished micro-batches, as a user or a crash would."""

    def __init__(self, path: Path, micro: int, how: str) -> None:
        self.path, self.micro, self.how = path, micro, how

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.micro:
            if self.how == "stop":
                trainer.save_checkpoint(self.path)
                trainer.should_stop = True
            else:
                raise KeyboardInterrupt

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


def train(data: LatentData, *, ranks: int = 1, ckpt_path=None, callbacks=(), steps: int = 8) -> Toy:
    data.seat = (0, ranks) if ranks > 1 else None
    toy = Toy()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation(ranks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(toy, datamodule=data, ckpt_path=ckpt_path)
    return toy


def weights(toy: Toy) -> list[float]:
    return [float(value) for parameter in toy.parameters() for value in parameter.detach().flatten()]


def damage(folder: Path, numbers: list[int]) -> None:
    for row in read_manifest(folder).rows():
        if int(row.key, 16) in numbers:
            with open(folder / row.shard, "r+b") as file:
                file.seek(row.media_offset + 40)
                file.write(b"\xff" * 20)
