"""Ways to sample that join what is drawn to videos: extend (by any length, in flat memory), connect, loop.

How they are joined stands in sample_joints.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from soratrain.diffusion.ways import TIME
from soratrain.errors import ConfigError
from soratrain.stages.sample_inputs import Taken, open_video
from soratrain.stages.sample_joints import Backwards, Bridged, Forwards
from soratrain.stages.sample_tasks import Order, Scene, Task, latents_of


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

    def ends(self, order: Order) -> tuple[Taken, Taken]:
        if self.video2 is not None:
            raise ConfigError(f"task.video2={self.video2}: task=loop takes one video; leave it out, or task=connect")
        taken = order.taken(open_video("task.video", self.video or ""))
        return taken, taken
