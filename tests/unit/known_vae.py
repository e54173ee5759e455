"""An autoencoder whose errors are known, and the job that measures it."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import nn

from soratrain.models.vae import VAE, regroup
from soratrain.stages.evaluate_vae import EvaluateVAE
from soratrain.stages.vae_summary import show

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"


FACTORY = partial(
    VAE,
    latent_channels=4,
    channels=[8, 8],
    time_strides=[2],
    space_strides=[2],
    encoder_blocks=[0, 1],
    decoder_blocks=[1, 1],
    time_kernels=[1, 3],
    front_strides=[2, 4],
)


OFF: dict = {"lpips": {"vgg": None, "lin": None}, "fvd": {"i3d": None, "frames": 9}}


class Known(nn.Module):
    """Gives back the clip with an error that is known: 2 levels in frame 0, then 3, 4, 5, 6 and again 3."""

    stride = (4, 8, 8)

    def __init__(self, broken: int | None = None) -> None:
        super().__init__()
        self.broken, self.most = broken, 0

    def encode_stream(self, chunks, frames_per_step, pixels_per_step=None):
        for chunk in regroup(chunks, first=1, step=frames_per_step):
            self.most = max(self.most, chunk.shape[2])
            yield chunk

    def decode_stream(self, chunks, latents_per_step, pixels_per_step=None):
        number = 0
        for chunk in chunks:
            frames = chunk.clone()
            for place in range(frames.shape[2]):
                frames[:, :, place] += self.level(number) / 127.5
                if number == self.broken:
                    frames[:, 0, place, 3, 4] = torch.nan
                number += 1
            yield frames

    @staticmethod
    def level(frame: int) -> int:
        return 2 if frame == 0 else 3 + (frame - 1) % 4


def decibels(level: float) -> float:
    return 20 * math.log10(255 / level)


def job(folder: Path, shards: str | list[str], **changed) -> EvaluateVAE:
    values = {"clips": 64, "min_frames": 5, "max_frames": None, "size": None, "shown": 2, "seed": 0, **OFF, **changed}
    return EvaluateVAE(out=str(folder / "out"), vae=str(folder / "vae"), shards=shards, device="cpu", **values)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "report.json").read_text())


def figures(folder: Path, metric: str = "psnr") -> dict[str, float]:
    return {row["name"]: row[metric]["mean"] for row in report_of(folder)["rows"]}


class I3D(nn.Module):
    """In the place of I3D: each channel's mean, and the number of frames."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        if not (rescale and resize and return_features):
            raise ValueError("not as StyleGAN-V calls it")
        return torch.cat([x.mean(dim=[2, 3, 4]), torch.full([x.shape[0], 1], float(x.shape[2]))], dim=1)


class StandIn(nn.Module):
    """In the place of LPIPS: the mean absolute difference of images in [-1, 1]."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        assert x.shape[1] == 3 and x.min() >= -1 and x.max() <= 1
        return (x - y).abs().mean(dim=(1, 2, 3))


def shown(report: dict, width: int, capsys) -> list[str]:
    capsys.readouterr()
    show(Console(width=width, soft_wrap=True, highlight=False, color_system=None), report)
    return capsys.readouterr().out.splitlines()
