"""Clips through an autoencoder and back, streamed, with the time and the numbers that it takes."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from soratrain.batch import to_pixels
from soratrain.errors import ConfigError, DataError
from soratrain.models.autoencoders import load_vae
from soratrain.models.tiles import LEAST
from soratrain.stages.clips import Clip

LATENT_BITS = 16  # latents are stored in bf16 or fp16


class Rebuild:
    """An autoencoder at work.

    Args:
        folder: of the weights.
        device: where it runs.
        pixels_per_batch: pixels (frames × height × width) worked on at once; of large frames, tiles.
        precision: `bf16-mixed` runs it under autocast, `32-true` does not.

    Raises:
        ConfigError: the weights are not of an autoencoder, or another's that cannot be read here.
        DataError: weights are missing, of another config, or hold what is not a number.
    """

    def __init__(self, folder: str, device: torch.device, pixels_per_batch: int, precision: str) -> None:
        self.module = load_vae(folder, device)
        broken = [name for name, value in self.module.state_dict().items() if not value.isfinite().all()]
        if broken:
            listed = ", ".join(broken[:5]) + (f" and {len(broken) - 5} more" if len(broken) > 5 else "")
            raise DataError(f"inputs.vae={folder}: weights are NaN or infinite in {listed}; train them again")
        self.stride = self.module.stride
        self.device, self.pixels_per_batch, self.precision = device, pixels_per_batch, precision
        self.pixel_values = self.latent_values = self.channels = 0
        self.seconds = {"read": 0.0, "encode": 0.0, "decode": 0.0}
        self.frames = 0
        self._working: list[tuple[str, float]] = []

    def restart(self) -> None:
        """Forget the time so far: what comes first is slow, since a device warms up."""
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        self.frames = 0

    def __call__(self, clip: Clip) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the frames of a clip, uint8 `[n, H, W, 3]`, and their reconstruction, fp32 `[n, 3, H, W]`, in pieces.

        Raises:
            DataError: the clip cannot be decoded.
        """
        step = max(1, self.pixels_per_batch // (clip.bucket.height * clip.bucket.width) // self.stride[0])
        budget = max(self.pixels_per_batch, LEAST)  # of frames that are larger it takes tiles
        waiting: deque[Tensor] = deque()

        def pixels() -> Iterator[Tensor]:
            for piece in clip.pieces():
                waiting.append(torch.from_numpy(piece).to(self.device))
                self.pixel_values += piece.size
                yield to_pixels(waiting[-1][None])

        def latents() -> Iterator[Tensor]:
            source = self._timed("read", pixels())
            for latent in self._timed("encode", self.module.encode_stream(source, step * self.stride[0], budget)):
                self.latent_values += latent.numel()
                self.channels = latent.shape[1]
                yield latent

        for rebuilt in self._timed("decode", self.module.decode_stream(latents(), step, budget)):
            frames = rebuilt[0].float().transpose(0, 1)
            self.frames += len(frames)
            yield take(waiting, len(frames)), frames
        assert not waiting, f"{sum(map(len, waiting))} frames of {clip.name} did not come back"

    def _timed(self, name: str, work: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield what `work` yields; the time that passes in it, but not in what it waits for, is added to `name`."""
        work = iter(work)
        while True:
            self._working.append((name, self._now()))
            try:
                with (
                    torch.no_grad(),
                    torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision.startswith("bf16")),
                ):
                    item = next(work, None)
            finally:
                name, began = self._working.pop()
                passed = self._now() - began
                self.seconds[name] += passed
                if self._working:
                    self.seconds[self._working[-1][0]] -= passed
            if item is None:
                return
            yield item

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def cost(self) -> dict[str, Any]:
        """Return size, speed, and how much smaller the clips became, counted in values and in bits."""
        values = self.pixel_values / self.latent_values
        return {
            "parameters": sum(parameter.numel() for parameter in self.module.parameters()),
            "stride": list(self.stride),
            "latent_channels": self.channels,
            "values_ratio": values,
            "values_ratio_of_long_clips": 3 * math.prod(self.stride) / self.channels,
            "bits_ratio": values * 8 / LATENT_BITS,
            "frames_per_s": self.frames / (self.seconds["encode"] + self.seconds["decode"]),
            "encode_frames_per_s": self.frames / self.seconds["encode"],
            "decode_frames_per_s": self.frames / self.seconds["decode"],
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU",
            "precision": self.precision,
        }


def take(waiting: deque[Tensor], count: int) -> Tensor:
    """Take the first `count` frames out of pieces of frames."""
    taken: list[Tensor] = []
    while count:
        piece = waiting.popleft()
        if len(piece) > count:
            waiting.appendleft(piece[count:])
        taken.append(piece[:count])
        count -= len(taken[-1])
    return torch.cat(taken)


def check_size(size: Sequence[int], stride: Sequence[int]) -> None:
    """Raise ConfigError, naming the nearest, unless a size (height, width) is a multiple of a VAE's stride."""
    rows, columns = stride[1:]
    if size[0] % rows or size[1] % columns:
        height, width = max(size[0] // rows, 1) * rows, max(size[1] // columns, 1) * columns
        raise ConfigError(
            f"stage.job.size={size[1]}x{size[0]}: is no multiple of the VAE's stride of {columns}x{rows} pixels; use"
            f" {width}x{height}"
        )
