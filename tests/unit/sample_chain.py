"""An untrained chain to draw from, and files of every kind to start from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from dit_stage_tiny import write_chain

from soratrain.diffusion.sampler import Sampler
from soratrain.media import write_image, write_video
from soratrain.stages.sample import Sample
from soratrain.stages.sample_tasks import Order, Task

HEIGHT, WIDTH, FRAMES = 32, 48, 23


@dataclass(frozen=True)
class Chain:
    """A folder with weights of an untrained chain, and files to start from."""

    folder: Path

    def file(self, name: str) -> str:
        return str(self.folder / name)

    def job(self, task: Task, **kwargs: Any) -> Sample:
        settings: dict[str, Any] = dict(
            out=self.file("out"), vae=self.file("."), dit=self.file("."), task=task, prompt="a cat", area="48x32"
        )
        settings |= {"size": None, "frames": 9, "fps": None, "seed": 0, "sampler": Sampler(steps=2, guidance_scale=2.0)}
        return Sample(**(settings | kwargs))


def clip(frames: int, seed: int) -> np.ndarray:
    """Return a picture that moves by a pixel a frame."""
    blocks = np.random.default_rng(seed).integers(0, 255, (HEIGHT // 8, WIDTH // 8, 3)).astype(np.uint8)
    picture = blocks.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, shift, 1) for shift in range(frames)])


def write_files(folder: Path) -> Chain:
    """Write an untrained chain's weights, and files to start from, good ones and bad ones."""
    write_chain(folder)
    write_video(folder / "a.mp4", clip(FRAMES, 0), 8)
    write_video(folder / "b, café 三.mp4", clip(11, 1), 8)
    write_video(folder / "fast.mp4", clip(11, 1), 24)
    write_image(folder / "picture.png", np.repeat(clip(1, 2)[0], 2, axis=0))
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[:, :14] = 255
    write_image(folder / "mask.png", mask)
    write_image(folder / "mask2.png", mask.repeat(2, 0).repeat(2, 1))
    write_image(folder / "black.png", 0 * mask)
    write_image(folder / "tall.png", mask.swapaxes(0, 1))
    write_video(folder / "masks.mp4", np.stack([mask] * 7), 8)
    (folder / "broken.png").write_bytes((folder / "picture.png").read_bytes()[:60])
    (folder / "text.mp4").write_text("no video")
    (folder / "empty.mp4").write_bytes(b"")
    with av.open(str(folder / "sound.m4a"), "w", format="mp4") as container:
        sound = container.add_stream("aac", rate=8000)
        noise = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        noise.rate = 8000
        container.mux([*sound.encode(noise), *sound.encode(None)])
    return Chain(folder)


def order(frames: int | None = 9, size: tuple[int, int] | None = None, fps: float | None = None) -> Order:
    """Return what is asked of a scene."""
    return Order(size, frames, fps, HEIGHT * WIDTH)
