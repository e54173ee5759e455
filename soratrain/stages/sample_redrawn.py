"""Ways to sample that draw a video anew: in part (inpaint), from its own noised latents (edit), or finer (refine)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import repeat
from math import gcd, inf
from typing import ClassVar, Literal

import cv2
import numpy as np
import torch
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.ways import TIME, Layout, known_positions, over, within
from soratrain.errors import ConfigError, DataError
from soratrain.stages.sample_fit import cover, feathered, filled, inside, mixed, size_near
from soratrain.stages.sample_inputs import Taken, Video, open_video
from soratrain.stages.sample_tasks import Order, Scene, Task


def trimmed(taken: Taken, order: Order, unit: int = TIME) -> tuple[int, str]:
    """Return how many frames are taken, 1 + a multiple of `unit` and at most `order.frames`, and that in words."""
    if order.frames is not None and order.frames < 1:
        raise ConfigError(f"frames={order.frames} must be at least 1; leave it out to take all of the video's")
    frames = taken.frames if order.frames is None else min(taken.frames, order.frames)
    frames -= (frames - 1) % unit
    return frames, f"the first {frames} of {taken.frames} frames" if frames < taken.frames else ""


@dataclass(frozen=True, kw_only=True)
class Inpaint(Task):
    """A video of which the white part of a mask is drawn anew; or, scaled to lie inside `size`, what is around it.

    What the mask hides is filled with the colours around it before the video is encoded. So no latent that the net is
    given knows anything of what is to go, however far the VAE sees, and all that show nothing of the mask are given: to
    leave out those within the VAE's reach of the mask instead would leave nothing of a small video.

    Args:
        video: the file.
        mask: a picture or a video of the same aspect ratio and, if it is a video, of as many frames.
        fit: `cover` scales the video to cover `size` and crops it; `inside` paints around it, with or without a mask.
        margin: patches around the mask that are drawn anew too.
    """

    name: ClassVar[str] = "inpaint"
    files: ClassVar[tuple[str, ...]] = ("video", "mask")

    video: str | None = None
    mask: str | None = None
    fit: Literal["cover", "inside"] = "cover"
    margin: int = 0

    def scene(self, order: Order) -> Scene:
        if self.margin < 0:
            raise ConfigError(f"task.margin={self.margin}: must be at least 0")
        taken = order.taken(open_video("task.video", self.video or ""))
        mask = None
        if self.mask or self.fit == "cover":
            mask = open_video("task.mask", self.mask or "")
        frames, cut = trimmed(taken, order)
        order.checked(taken.height, taken.width, frames)
        around = f"scaled to lie inside {taken.width}x{taken.height}" if self.fit == "inside" else ""
        scene = Inpainted(
            taken.height,
            taken.width,
            frames,
            taken.fps,
            1 + (frames - 1) // TIME,
            inputs=(taken.video, *([mask] if mask else [])),
            said=(taken.said(around, cut, fitted=not around), of_mask(taken.video, mask)),
            taken=taken,
            mask=mask,
            framed=self.fit == "inside",
            margin=self.margin,
        )
        if not any(hidden.any() for hidden in scene.hidden()):
            why = "no white in it: nothing is to be drawn" if mask else "the video fills all of the size"
            key = f"task.mask={self.mask}" if mask else f"task.fit={self.fit}"
            raise DataError(f"{key}: {why}; paint white what is to be drawn anew, or give another size")
        return scene


def of_mask(video: Video, mask: Video | None) -> str:
    """Return in words what is done to a mask."""
    if mask is None or (mask.height, mask.width) == (video.height, video.width):
        return ""
    return f"{mask.path}: {mask.width}x{mask.height} scaled to the video's {video.width}x{video.height}, then like it"


@dataclass(frozen=True, kw_only=True)
class Inpainted(Scene):
    """Outside of the mask the frames are the video's own, to the bit, from `FEATHER` pixels beside it."""

    mode: ClassVar[str] = "inpaint"

    taken: Taken
    mask: Video | None
    framed: bool
    margin: int

    def originals(self) -> Iterator[np.ndarray]:
        """Yield the video's frames at the size that is drawn."""
        if not self.framed:
            return self.taken.read(0, self.frames)
        return (inside(frame, self.height, self.width) for frame in self.taken.raw(0, self.frames))

    def hidden(self) -> Iterator[np.ndarray]:
        """Yield what is drawn anew of each frame, bool `[H, W]`."""
        video = self.taken.video
        if self.mask is None:
            masks: Iterable[np.ndarray] = repeat(np.zeros((video.height, video.width), bool), self.frames)
        else:
            masks = self.taken.masks(self.mask, self.frames)
        around = ~inside(np.ones((video.height, video.width), bool), self.height, self.width)
        for mask in masks:
            yield (
                inside(mask, self.height, self.width) | around if self.framed else cover(mask, self.height, self.width)
            )

    def layout(self, generate: Generator) -> Layout:
        hidden = torch.from_numpy(np.stack(list(self.hidden())))
        known = known_positions(hidden, generate.vae.stride, generate.dit.patch, self.margin)
        pairs = zip(self.originals(), self.hidden(), strict=True)
        return within(generate.encoded(filled(frame, mask) for frame, mask in pairs), known, self.fps)

    def show(self, generate: Generator, layout: Layout, drawn: Tensor) -> Iterator[np.ndarray]:
        for frame, original, mask in zip(generate.decode_stream([drawn]), self.originals(), self.hidden(), strict=True):
            yield mixed(original, frame, feathered(mask))


@dataclass(frozen=True, kw_only=True)
class Edit(Task):
    """A video drawn anew as a text says, from its own latents noised in part (SDEdit: Meng et al., 2021).

    Args:
        video: the file.
        strength: the noise level from which it is drawn: 1 keeps nothing of it; the less, the more stays.
    """

    name: ClassVar[str] = "edit"
    files: ClassVar[tuple[str, ...]] = ("video",)

    video: str | None = None
    strength: float = 0.7

    def scene(self, order: Order) -> Scene:
        self.check_strength(self.strength)
        taken = order.taken(open_video("task.video", self.video or ""))
        frames, cut = trimmed(taken, order)
        order.checked(taken.height, taken.width, frames)
        return Redrawn(
            taken.height,
            taken.width,
            frames,
            taken.fps,
            1 + (frames - 1) // TIME,
            inputs=(taken.video,),
            said=(taken.said(cut),),
            strength=self.strength,
            taken=taken,
        )


@dataclass(frozen=True, kw_only=True)
class Refine(Task):
    """A video made larger, or of more frames a second, by the same model.

    It is scaled up and its latents are noised in part. Frames in between begin as mixtures of their neighbours, and the
    net is given every known one as a clip of one frame at its time. What comes out is drawn all of it: of the file's
    own frames between drawn ones each would be seen to flicker.

    Args:
        video: the file: a sample, or any other.
        scale: how much larger, where no `size` is given.
        rate: how many times as many frames a second.
        strength: the noise level from which it is drawn: 1 keeps the known frames alone; the less, the nearer.
    """

    name: ClassVar[str] = "refine"
    files: ClassVar[tuple[str, ...]] = ("video",)

    video: str | None = None
    scale: float = 2.0
    rate: int = 1
    strength: float = 0.35

    def scene(self, order: Order) -> Scene:
        self.check_strength(self.strength)
        if not 1 <= self.scale < inf or self.rate < 1:
            raise ConfigError(f"task.scale={self.scale:g} and task.rate={self.rate} must be numbers of at least 1")
        if order.fps is not None:
            raise ConfigError(f"fps={order.fps:g}: task=refine takes the video's own, task.rate times; leave it out")
        video = open_video("task.video", self.video or "")
        area = round(video.height * video.width * self.scale**2)
        height, width = order.size or size_near(video.height, video.width, area, order.unit, grow=True)
        taken = replace(order, size=(height, width)).taken(video)
        least = size_near(video.height, video.width, video.height * video.width, order.unit, grow=True)
        if max(height / least[0], width / least[1]) < 1:
            raise ConfigError(
                f"size={width}x{height}: {video.path} has {video.width}x{video.height}, and task=refine makes it"
                " larger; give a larger size, or use task=edit"
            )
        if (height, width) == least and self.rate == 1:
            raise ConfigError(
                f"task.scale={self.scale:g} and task.rate=1 come to {width}x{height}, the video's own: nothing is"
                " refined; raise one of them, or give a larger size"
            )
        known, cut = trimmed(taken, order, TIME // gcd(TIME, self.rate))
        frames = 1 + self.rate * (known - 1)
        if self.rate > 1 and known == 1:
            raise ConfigError(f"task.rate={self.rate}: {video.path} has {video.frames} frames; more are needed between")
        order.checked(height, width, frames)
        return Redrawn(
            height,
            width,
            frames,
            taken.fps * self.rate,
            1 + (frames - 1) // TIME + (known if self.rate > 1 else 0),
            inputs=(video,),
            said=(taken.said(cut),),
            strength=self.strength,
            taken=taken,
            rate=self.rate,
        )


@dataclass(frozen=True, kw_only=True)
class Redrawn(Scene):
    """A video drawn anew from its own latents; of every `rate`-th frame the picture is given where there are others."""

    taken: Taken
    rate: int = 1

    def given_as(self) -> str:
        return "prefix" if self.rate > 1 else ""  # a picture, as the first frame is in training

    def layout(self, generate: Generator) -> Layout:
        known = 1 + (self.frames - 1) // self.rate
        base = generate.encoded(between(self.taken.read(0, known), self.rate))
        pictures = []
        if self.rate > 1:
            pictures = [generate.encoded([frame]) for frame in self.taken.read(0, known)]
        return over(base, self.fps, pictures, self.rate)

    def show(self, generate: Generator, layout: Layout, drawn: Tensor) -> Iterable[np.ndarray]:
        return generate.decode_stream([drawn])


def between(frames: Iterable[np.ndarray], rate: int) -> Iterator[np.ndarray]:
    """Yield frames with `rate - 1` mixtures of two neighbours between them."""
    last = None
    for frame in frames:
        if last is not None:
            for step in range(1, rate):
                yield cv2.addWeighted(last, 1 - step / rate, frame, step / rate, 0)
        yield frame
        last = frame
