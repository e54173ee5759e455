"""Scenes that join what is drawn to videos, frame by frame.

The joint. What is drawn continues the latents of what is there, and both are decoded as one stream, whose state the
VAE carries over the joint; so nothing jumps in the drawing itself. But a decoded frame is a little softer than the
file's, and that would be seen where one follows the other. So the given frames are the file's own, to the bit, but for
the last `RAMP` before the joint, which pass by degrees into the decoded ones, and the first `RAMP` behind one.

What leads into a video has been drawn one frame further, to the video's first, which is decoded with the video. What
these two differ by is taken over by degrees in the last drawn frames.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import torch
from torch import Tensor

from soratrain.diffusion.generator import Generator
from soratrain.diffusion.rolling import Draw, backwards, forwards, noise_of
from soratrain.diffusion.ways import TIME, bridging
from soratrain.stages.sample_fit import mixed
from soratrain.stages.sample_inputs import Taken
from soratrain.stages.sample_tasks import Scene

RAMP = 8  # frames
LEAD = TIME - 1  # drawn frames that pass into what follows: those that are drawn as one latent with its first


@dataclass(frozen=True, kw_only=True)
class Joined(Scene, ABC):
    """A scene that rolls: it is drawn window by window, as its frames are taken.

    Attributes:
        taken: the videos that are joined.
        new: latents to draw.
        window, context: latents of a window, and of what is there that it sees.
    """

    taken: tuple[Taken, ...]
    new: int
    window: int
    context: int

    @abstractmethod
    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        """Yield the frames, drawing window by window."""


class Forwards(Joined):
    """A video, then what is drawn, as one stream of latents."""

    mode = "prefix"

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

    mode = "suffix"

    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        head = beginning(generate, self.taken[0], self.context)
        sizes = {"window": self.window, "context": self.context}
        windows = [part.cpu() for part in backwards(draw, head, self.new, self.fps, **sizes)]
        parts = windows[::-1]
        frames = generate.decode_stream([parts[0]])
        for part, follows in zip(parts, [*parts[1:], head], strict=True):
            then = generate.decode_stream([follows])
            first = next(then)
            yield from leading_into(frames, TIME * (part.shape[1] - 1), first)
            frames = chain([first], then)
        yield from resumed(self.taken[0], frames)


class Bridged(Joined):
    """A video, a bridge, and another video, or the same one again, which then is not repeated."""

    mode = "connect"

    def play(self, generate: Generator, draw: Draw) -> Iterator[np.ndarray]:
        first, second = self.taken
        head = beginning(generate, second, self.context)

        def more(tail: Tensor, standalone: bool) -> Iterator[Tensor]:
            yield draw(bridging(tail, self.new, head, self.fps, standalone=standalone), noise_of(0))

        decoded = list(islice(generate.decode_stream([head]), RAMP))
        new = TIME * self.new - 1
        frames = leading_into(continued(generate, first, self.context, more), first.frames + new, decoded[0])
        if first is not second:
            yield from frames
            yield from resumed(second, decoded)
            return
        for number, frame in enumerate(frames):
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


def leading_into(frames: Iterator[np.ndarray], count: int, first: np.ndarray) -> Iterator[np.ndarray]:
    """Yield `count` frames, of which the last `LEAD` pass into a clip that begins with `first`.

    Args:
        frames: one more than `count`; the last shows what `first` shows.
    """
    yield from islice(frames, count - LEAD)
    *last, same = islice(frames, LEAD + 1)
    gap = first.astype(np.float32) - same
    for number, frame in enumerate(last, 1):
        yield (frame + gap * (number / (LEAD + 1))).round().clip(0, 255).astype(np.uint8)


def resumed(taken: Taken, frames: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Yield a video's frames, the first passing from the decoded `frames` of its beginning into its own."""
    decoded = list(islice(frames, RAMP))
    for number, frame in enumerate(taken.read()):
        share = 1 - number / len(decoded)
        yield mixed(frame, decoded[number], share) if number < len(decoded) else frame
