"""Ways to sample that join what is drawn to videos: extend (by any length, in flat memory), connect, loop.

The joint. What is drawn continues the latents of what is there, and both are decoded as one stream, whose state the
VAE carries over the joint; so nothing jumps in the drawing itself. But a decoded frame is a little softer than the
file's, and that would be seen where one follows the other. So the given frames are the file's own, to the bit, but for
the last `RAMP` before the joint, which pass by degrees into the decoded ones, and the first `RAMP` behind one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.rolling import Draw, backwards, forwards, noise_of
from soratrain.diffusion.ways import TIME, bridging
from soratrain.errors import ConfigError
from soratrain.stages.sample_fit import mixed
from soratrain.stages.sample_inputs import Taken, open_video
from soratrain.stages.sample_tasks import Order, Scene, Task, latents_of

RAMP = 8  # frames


def window_of(order: Order, name: str) -> int:
    """Return the latents of a window of `frames`."""
    if order.frames is None or order.frames < 1 + TIME:
        raise ConfigError(f"frames={order.frames}: are those of a window of task={name}; give {1 + TIME} or more")
    return 1 + (order.frames - 1) // TIME


def context_of(context: int | None, window: int) -> int:
    """Return the latents of what is there that a window sees; by default those of a third of its frames.

    Raises:
        ConfigError: frames that are not 1 + 4k, or leave nothing to draw.
    """
    if context is None:
        return min(1 + max(1, (window - 1) // 3), window - 1)
    if context < 1 or (context - 1) % TIME:
        below = max(context - 1, 0) // TIME * TIME + 1
        raise ConfigError(f"task.context={context} is not 1 + a multiple of {TIME}; use {below} or {below + TIME}")
    latents = 1 + (context - 1) // TIME
    if latents >= window:
        most = 1 + (window - 2) * TIME
        raise ConfigError(f"task.context={context}: leaves nothing to draw in a window; use {most}, or more frames")
    return latents


def check_by(by: int) -> None:
    """Refuse to draw nothing."""
    if by < 1:
        raise ConfigError(f"task.by={by}: must be at least 1 frame")


def played(taken: Taken) -> str:
    """Return in words what a video is."""
    return f"{taken.video.frames} frames at {float(taken.video.rate):g} a second"


@dataclass(frozen=True, kw_only=True)
class Extend(Task):
    """A video, and what comes after or before it.

    Args:
        video: the file.
        by: frames to draw, rounded up to a multiple of 4; any number.
        direction: `forwards` or `backwards`.
        context: frames of what is there that each window sees, 1 + 4k; None: about a third of a window.
    """

    name: ClassVar[str] = "extend"
    files: ClassVar[tuple[str, ...]] = ("video",)

    video: str | None = None
    by: int = 16
    direction: Literal["forwards", "backwards"] = "forwards"
    context: int | None = None

    def scene(self, order: Order) -> Scene:
        check_by(self.by)
        taken = order.taken(open_video("task.video", self.video or ""))
        window = window_of(order, self.name)
        order.checked(taken.height, taken.width, order.frames or 0)
        context, steps = context_of(self.context, window), latents_of(self.by)
        kind = Forwards if self.direction == "forwards" else Backwards
        return kind(
            taken.height,
            taken.width,
            taken.frames + TIME * steps,
            taken.fps,
            window if kind is Forwards else window + 1,
            runs=-(-steps // (window - context)),
            inputs=(taken.video,),
            said=(taken.said(played(taken), f"{TIME * steps} frames are drawn {self.direction}"),),
            taken=(taken,),
            new=steps,
            window=window,
            context=context,
        )


@dataclass(frozen=True, kw_only=True)
class Connect(Task):
    """A video, a bridge that is drawn, and another video.

    Args:
        video, video2: the files; the second comes at the size and rate of the first.
        by: frames of the bridge, rounded up to 4k - 1.
        context: frames of each that the bridge sees, 1 + 4k; None: about a third of `frames`.
    """

    name: ClassVar[str] = "connect"
    files: ClassVar[tuple[str, ...]] = ("video", "video2")

    video: str | None = None
    video2: str | None = None
    by: int = 15
    context: int | None = None

    def ends(self, order: Order) -> tuple[Taken, Taken]:
        """Return the videos between which is drawn."""
        first = order.taken(open_video("task.video", self.video or ""))
        like = replace(order, size=(first.height, first.width), fps=first.fps)
        return first, like.taken(open_video("task.video2", self.video2 or ""))

    def scene(self, order: Order) -> Scene:
        check_by(self.by)
        first, second = self.ends(order)
        context, steps = context_of(self.context, window_of(order, self.name)), latents_of(self.by + 1)
        order.checked(first.height, first.width, order.frames or 0)
        whole = [first] if first is second else [first, second]
        return Bridged(
            first.height,
            first.width,
            sum(part.frames for part in whole) + TIME * steps - 1,
            first.fps,
            steps + 2 * context,
            inputs=tuple(part.video for part in whole),
            said=(
                first.said(played(first), f"{TIME * steps - 1} frames are drawn after it"),
                *(second.said(played(second)) for _ in whole[1:]),
            ),
            taken=(first, second),
            new=steps,
            window=steps + 2 * context,
            context=context,
        )


@dataclass(frozen=True, kw_only=True)
class Loop(Connect):
    """A video, and a bridge from its end to its beginning, so that it plays round and round.

    Args:
        video, by, context: as in `Connect`.
    """

    name: ClassVar[str] = "loop"
    files: ClassVar[tuple[str, ...]] = ("video",)

    def ends(self, order: Order) -> tuple[Taken, Taken]:
        taken = order.taken(open_video("task.video", self.video or ""))
        return taken, taken


@dataclass(frozen=True, kw_only=True)
class Joined(Scene):
    """A scene that rolls.

    Attributes:
        taken: the videos that are joined.
        new: latents to draw.
        window, context: latents of a window, and of what is there that it sees.
    """

    rolls: ClassVar[bool] = True

    taken: tuple[Taken, ...]
    new: int
    window: int
    context: int


class Forwards(Joined):
    """A video, then what is drawn, as one stream of latents."""

    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        def more(tail: Tensor, standalone: bool) -> Iterator[Tensor]:
            sizes = {"window": self.window, "context": self.context}
            return forwards(draw, tail, self.new, self.fps, standalone=standalone, **sizes)

        return continued(generate, self.taken[0], self.context, more)


class Backwards(Joined):
    """What is drawn, then a video.

    Windows are drawn from the latest to the earliest, so their latents are held until all are: a twelfth of what their
    pixels would take.
    """

    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        head = beginning(generate, self.taken[0], self.context)
        sizes = {"window": self.window, "context": self.context}
        windows = [part.cpu() for part in backwards(draw, head, self.new, self.fps, **sizes)]
        for part in reversed(windows):
            new = TIME * (part.shape[1] - 1)  # its last frame is the first of what follows
            yield from islice(generate.decode_stream([part]), new)
        yield from resumed(generate, self.taken[0], head)


class Bridged(Joined):
    """A video, a bridge, and another video, or the same one again, which then is not repeated."""

    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        first, second = self.taken
        head = beginning(generate, second, self.context)

        def more(tail: Tensor, standalone: bool) -> Iterator[Tensor]:
            yield draw(bridging(tail, self.new, head, self.fps, standalone=standalone), noise_of(0))

        new = TIME * self.new - 1
        if first is not second:
            yield from islice(continued(generate, first, self.context, more), first.frames + new)
            yield from resumed(generate, second, head)
            return
        decoded = list(islice(generate.decode_stream([head]), RAMP))
        for number, frame in enumerate(islice(continued(generate, first, self.context, more), first.frames + new)):
            early = number < min(len(decoded), first.frames)  # both ends of it pass into what is drawn
            yield mixed(frame, decoded[number], 1 - number / len(decoded)) if early else frame


def beginning(generate: Generator, taken: Taken, context: int) -> Tensor:
    """Return the latents of a video's first frames, encoded standalone."""
    return generate.encoded(taken.read(0, 1 + TIME * min(context - 1, (taken.frames - 1) // TIME)))


def continued(
    generate: Generator, taken: Taken, context: int, more: Callable[[Tensor, bool], Iterator[Tensor]]
) -> Iterator[np.ndarray]:
    """Yield a video's frames and those of the latents that follow, in one pass and as one stream.

    Its last 1 + 4k frames are encoded; up to three before them are only handed on.

    Args:
        more: gives the latents that follow, from the last `context` of the video's own and whether these begin with its
            first.
    """
    frames = taken.read()
    skipped = (taken.frames - 1) % TIME
    yield from islice(frames, skipped)
    originals: deque[np.ndarray] = deque()

    def pixels() -> Iterator[np.ndarray]:
        for frame in frames:
            originals.append(frame)
            yield frame

    def latents() -> Iterator[Tensor]:
        tail, count = None, 0
        for piece in generate.encode(pixels()):
            joined = piece if tail is None else torch.cat((tail, piece), dim=1)
            tail, count = joined[:, -context:], count + piece.shape[1]
            yield piece
        assert tail is not None, "a video that was opened has a frame"
        yield from more(tail, count <= context)

    count = taken.frames - skipped
    ramp = min(RAMP, count)
    for number, frame in enumerate(generate.decode_stream(latents())):
        share = (number - (count - ramp) + 1) / ramp
        yield mixed(originals.popleft(), frame, max(share, 0.0)) if number < count else frame


def resumed(generate: Generator, taken: Taken, head: Tensor) -> Iterator[np.ndarray]:
    """Yield a video's frames, the first passing from those of its latents `head` into its own."""
    decoded = list(islice(generate.decode_stream([head]), RAMP))
    for number, frame in enumerate(taken.read()):
        share = 1 - number / len(decoded)
        yield mixed(frame, decoded[number], share) if number < len(decoded) else frame
