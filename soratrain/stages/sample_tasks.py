"""What `stage=sample` can be asked for, made ready before a net is read: inputs opened, sizes settled, the rest said.

A task (of the group `task`) makes a `Scene` of an `Order`. Most scenes are one window: a layout, then the frames of
what was drawn; those of one shape are drawn together. Others roll (sample_joined.py).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sizes import check_size
from soratrain.diffusion.ways import TIME, Layout, following
from soratrain.errors import ConfigError
from soratrain.models.patchify import STRIDE
from soratrain.stages.sample_fit import cover, every, said_of, size_near
from soratrain.stages.sample_inputs import Picture, Taken, Video, open_picture

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What is asked for besides the task.

    Attributes:
        size: height and width; None takes them off the task's input.
        frames: of the clip, or of a window where it rolls; None takes all of the input.
        fps: None takes the input's.
        area: pixels of a frame whose size is taken off the input, about.
        patch: of the net.
        stride: of the VAE in time, height and width.
    """

    size: tuple[int, int] | None
    frames: int | None
    fps: float | None
    area: int
    patch: Sequence[int] = (1, 2, 2)
    stride: Sequence[int] = STRIDE

    @property
    def unit(self) -> tuple[int, int]:
        """Rows and columns of pixels that sizes are multiples of."""
        return self.stride[1] * self.patch[1], self.stride[2] * self.patch[2]

    def own_size(self, picture: Picture | Video) -> tuple[int, int]:
        """Return height and width: those asked for, or near those of an input."""
        if self.size is not None:
            return self.size
        still = isinstance(picture, Picture)
        height, width = picture.pixels.shape[:2] if isinstance(picture, Picture) else (picture.height, picture.width)
        return size_near(height, width, self.area, self.unit, grow=still)

    def taken(self, video: Video) -> Taken:
        """Return a video at this size and rate."""
        return Taken(video, every(video.rate, self.fps, video.key), *self.own_size(video))

    def checked(self, height: int, width: int, frames: int) -> None:
        """Refuse sizes that cannot be drawn."""
        check_size(height, width, frames, self.patch, self.stride)


@dataclass(frozen=True)
class Scene:
    """A way to sample, made ready: what comes out, and from what.

    Attributes:
        height, width, frames, fps: of what comes out.
        steps: latent frames of the largest forward, those given counted in.
        runs: how many runs of the sampler it takes.
        inputs: the files, by key.
        said: what is done to them, for people.
        strength: the noise level at which a run starts.
    """

    mode: ClassVar[str] = ""  # how the net is given parts of clips in training, where it is to have learned that

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    runs: int = 1
    inputs: tuple[Picture | Video, ...] = ()
    said: tuple[str, ...] = ()
    strength: float = 1.0

    def key(self) -> tuple[Any, ...]:
        """Return what scenes have in common that are drawn together: all that decides the shapes of their layouts."""
        return type(self).__name__, self.height, self.width, self.frames, self.steps, self.strength

    def check(self, generate: Generator) -> None:
        """Refuse what these nets cannot draw, and warn of what they have not learned.

        Raises:
            ConfigError: a size off their stride, or a patch of several latents where some are given.
        """
        patch = generate.dit.patch
        mode = self.given_as()
        if patch[0] > 1 and mode:
            raise ConfigError(f"dit.patch={list(patch)}: holds {patch[0]} latents, of which some would be given; use 1")
        if mode and generate.mix is not None and not generate.mix.get(mode):
            log.warning(
                "the DiT was trained with conditioning.mix.%s=0 and has never been given what this starts from; it may"
                " pass over it: train one with conditioning=segments",
                mode,
            )
        check_size(self.height, self.width, 1 + TIME * (self.steps - 1), patch, generate.vae.stride)

    def given_as(self) -> str:
        """Return the mode of training in which the net is given parts as here; "" where it is given none."""
        return self.mode

    def positions(self, generate: Generator) -> int:
        """Return the latent positions of the largest forward."""
        _, _, high, wide = generate.shape(self.height, self.width, 1)
        return self.steps * high * wide

    def cost(self, generate: Generator) -> int:
        """Return what it takes, about, in latent positions."""
        return self.positions(generate) * self.runs

    def layout(self, generate: Generator) -> Layout:
        """Return what is given and what is to be drawn."""
        return Layout(generate.shape(self.height, self.width, self.frames), self.fps)

    def show(self, generate: Generator, layout: Layout, drawn: Tensor) -> Iterable[np.ndarray]:
        """Return the frames, uint8 `[H, W, 3]`, of the drawn stretch and what belongs to it."""
        before = [given.latent.to(drawn.device) for given in layout.before]
        return generate.decode_stream([torch.cat((*before, drawn), dim=1)])


@dataclass(frozen=True, kw_only=True)
class Task:
    """What all tasks have; their fields are the options of the config's group."""

    name: ClassVar[str]
    files: ClassVar[tuple[str, ...]] = ()  # of the fields, those that name an input

    def scene(self, order: Order) -> Scene:
        """Return it made ready.

        Raises:
            ConfigError: an input is missing, or is not what the task takes.
            DataError: an input cannot be read.
        """
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """Return the options that name no file."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name not in self.files}

    def required(self, order: Order, *names: str) -> None:
        """Refuse an order without a value that this task takes off no input."""
        for name in names:
            if getattr(order, name) is None:
                raise ConfigError(f"{name} is not set: task={self.name} takes it off no input; give {name}=…")

    def check_strength(self, strength: float) -> None:
        """Refuse a strength out of range."""
        if not 0 < strength <= 1:
            raise ConfigError(f"task.strength={strength:g} must lie in (0, 1]: the noise level from which it is drawn")


@dataclass(frozen=True, kw_only=True)
class T2V(Task):
    """A clip from a text."""

    name: ClassVar[str] = "t2v"

    def scene(self, order: Order) -> Scene:
        self.required(order, "size", "frames", "fps")
        assert order.size is not None and order.frames is not None and order.fps is not None
        order.checked(*order.size, order.frames)
        return Scene(*order.size, order.frames, order.fps, 1 + (order.frames - 1) // TIME)


@dataclass(frozen=True, kw_only=True)
class T2I(T2V):
    """A picture from a text."""

    name: ClassVar[str] = "t2i"

    def scene(self, order: Order) -> Scene:
        if order.frames not in (None, 1):
            raise ConfigError(f"frames={order.frames}: task=t2i draws one; leave it out, or use task=t2v")
        return super().scene(order)


@dataclass(frozen=True, kw_only=True)
class Animate(Task):
    """A clip that begins with a picture and goes on as a text says.

    Args:
        image: the file.
    """

    name: ClassVar[str] = "animate"
    files: ClassVar[tuple[str, ...]] = ("image",)

    image: str | None = None

    def scene(self, order: Order) -> Scene:
        self.required(order, "frames", "fps")
        assert order.frames is not None and order.fps is not None
        picture = open_picture("task.image", self.image or "")
        height, width = order.own_size(picture)
        order.checked(height, width, order.frames)
        if order.frames < 1 + TIME:
            raise ConfigError(f"frames={order.frames}: the picture is the first; give {1 + TIME} or more")
        fitted = said_of(height, width, *picture.pixels.shape[:2])
        return Animated(
            height,
            width,
            order.frames,
            order.fps,
            1 + (order.frames - 1) // TIME,
            inputs=(picture,),
            said=(f"{picture.path}: {fitted}",) if fitted else (),
        )


class Animated(Scene):
    """The first frame is a clip of one frame, encoded standalone; it comes out as the VAE shows it, not as the file.

    So nothing jumps between it and the second, and it is the same latent to the bit.
    """

    mode = "prefix"

    def layout(self, generate: Generator) -> Layout:
        (picture,) = self.inputs
        assert isinstance(picture, Picture)
        first = generate.encoded([cover(picture.pixels, self.height, self.width)])
        return following(first, self.steps - 1, self.fps, standalone=True)


def latents_of(frames: int) -> int:
    """Return how many latents so many frames take, the last perhaps in part."""
    return math.ceil(frames / TIME)
