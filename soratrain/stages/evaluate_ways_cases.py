"""What stage=evaluate target=ways draws: scenes of the world whose truth is known, and for each way the files it needs.

Every case is the task that `stage=sample` would be given, with files of its own, so that what is measured is what
users get. Scenes show combinations of one split; what a scene is to be changed into is one of the same split.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from data_prep.world import Scene, Seen, World, describe, render
from data_prep.world.demo import combinations
from data_prep.world.seen import COLORS, VOCABULARIES
from data_prep.world.shapes import EXTENTS
from soratrain.media import write_image, write_video
from soratrain.stages.sample_fit import scaled
from soratrain.stages.sample_joined import Connect, Extend, Loop
from soratrain.stages.sample_redrawn import Edit, Inpaint, Refine, between
from soratrain.stages.sample_tasks import T2V, Animate, Order, Task

SHORT, LONG = 9, 17  # frames of the scenes, the lengths of the clips that the demo trains on
HALF, THIRD = 9, 5  # frames of a long scene that are given to extend; and at each end to connect
BESIDE = 2.0  # pixels between an object, whatever its shape, and the edge of the mask that hides it


@dataclass(frozen=True, eq=False)
class Case:
    """One clip to draw.

    Attributes:
        way: its name in the report.
        scene: of the world, whose object's path is the truth about places.
        task, order: what is asked of `stage=sample`.
        truth: what a perfect model would draw, uint8 `[T, H, W, 3]`.
        wanted: what is to be seen in it; a field that is None is not judged.
        given: which of the frames that come out were given, bool `[T]`.
        source: what a way that draws anew began with, `[T, H, W, 3]` at the size and rate that come out.
    """

    way: str
    split: str
    number: int
    scene: Scene
    prompt: str
    task: Task
    order: Order
    truth: np.ndarray
    wanted: Seen
    given: np.ndarray
    source: np.ndarray | None = None


@dataclass(frozen=True)
class Maker:
    """Makes cases, and the files that they start from.

    Attributes:
        folder: for the files.
        window: frames of a window where one is asked for.
        edit, refine: strengths.
        patch: of the net.
    """

    world: World
    folder: Path
    window: int
    edit: float
    refine: float
    patch: Sequence[int] = (1, 2, 2)

    def cases(self, way: str, split: str, count: int) -> list[Case]:
        """Return `count` cases of a way."""
        frames = LONG if way in ("extend", "extend back", "connect") else SHORT
        return [WAYS[way](self, self.start(way, split, number, frames)) for number in range(count)]

    def continued(self, split: str, given: int, after: int, count: int) -> list[Case]:
        """Return `count` cases of a scene of which the first frames are given and `after` are drawn."""
        name = f"{given} then {after}"
        starts = [self.start(name, split, number, given + after) for number in range(count)]
        return [animate(self, start) if given == 1 else extend(self, start, given) for start in starts]

    def start(self, way: str, split: str, number: int, frames: int) -> Start:
        """Return a scene to begin with."""
        scene = self.world.clip(number, split, frames)
        stem = self.folder / f"{way.replace(' ', '-')}-{split}-{number:03d}"
        return Start(way, split, number, scene, render(scene), stem)


@dataclass(frozen=True, eq=False)
class Start:
    """A scene, its rendering, and how the names of its files begin."""

    way: str
    split: str
    number: int
    scene: Scene
    frames: np.ndarray
    stem: Path

    def video(self, name: str, frames: np.ndarray, fps: float | None = None) -> str:
        """Write a video; return its path."""
        path = self.stem.with_name(f"{self.stem.name}-{name}.mp4")
        write_video(path, frames, fps or self.scene.fps)
        return str(path)

    def case(self, maker: Maker, task: Task, frames: int | None, given: Sequence[int] = (), **more: object) -> Case:
        """Return the case of a task.

        Args:
            frames: of the order.
            given: which of the frames that come out are given.
        """
        scene = self.scene
        fps = scene.fps if isinstance(task, T2V | Animate) else None
        order = Order((scene.height, scene.width), frames, fps, scene.height * scene.width, tuple(maker.patch))
        found = {"prompt": describe(scene), "truth": self.frames, "wanted": scene.truth} | more
        marks = np.isin(np.arange(len(found["truth"])), given)  # type: ignore[arg-type]
        head = (self.way, self.split, self.number, scene)
        return Case(*head, task=task, order=order, given=marks, **found)  # type: ignore[arg-type]


def t2v(maker: Maker, start: Start) -> Case:
    """From the text alone."""
    return start.case(maker, T2V(), len(start.frames))


def animate(maker: Maker, start: Start) -> Case:
    """From the first frame."""
    path = start.stem.with_suffix(".png")
    write_image(path, start.frames[0])
    return start.case(maker, Animate(image=str(path)), len(start.frames), [0])


def extend(maker: Maker, start: Start, given: int = HALF) -> Case:
    """From the first frames."""
    video, by = start.video("head", start.frames[:given]), len(start.frames) - given
    return start.case(maker, Extend(video=video, by=by), maker.window, range(given))


def extend_back(maker: Maker, start: Start) -> Case:
    """From the last frames."""
    count = len(start.frames)
    task = Extend(video=start.video("tail", start.frames[-HALF:]), by=count - HALF, direction="backwards")
    return start.case(maker, task, maker.window, range(count - HALF, count))


def connect(maker: Maker, start: Start) -> Case:
    """From both ends."""
    count = len(start.frames)
    ends = start.video("head", start.frames[:THIRD]), start.video("tail", start.frames[-THIRD:])
    task = Connect(video=ends[0], video2=ends[1], by=count - 2 * THIRD)
    return start.case(maker, task, maker.window, [*range(THIRD), *range(count - THIRD, count)])


def loop(maker: Maker, start: Start) -> Case:
    """A clip that returns to its beginning; the truth goes back the way it came, which is no motion with a name."""
    truth, count = np.concatenate((start.frames, start.frames[-2:0:-1])), len(start.frames)
    things = tuple(replace(thing, motion=None) for thing in start.scene.truth.objects)
    wanted = replace(start.scene.truth, objects=things)
    task = Loop(video=start.video("round", start.frames), by=len(truth) - count)
    return start.case(maker, task, maker.window, range(count), truth=truth, wanted=wanted)


def inpaint(maker: Maker, start: Start) -> Case:
    """Another object in the place of the one that a mask hides."""
    other, (sprite,) = changed(start), start.scene.sprites
    shapes = VOCABULARIES[maker.world.preset].shapes
    reach = max(max(EXTENTS[shape]) for shape in shapes) * sprite.radius + BESIDE
    rows, columns = (np.arange(size) + 0.5 for size in start.frames.shape[1:3])
    away_x, away_y = (np.abs(axis - sprite.path[:, [at]]) for at, axis in enumerate((columns, rows)))
    mask = (away_y <= reach)[:, :, None] & (away_x <= reach)[:, None, :]
    veiled = np.where(mask[..., None], 255 - (255 - start.frames) // 4, start.frames).astype(np.uint8)
    white = np.repeat(mask[..., None], 3, -1).astype(np.uint8) * 255
    task = Inpaint(video=start.video("video", start.frames), mask=start.video("mask", white))
    return start.case(maker, task, None, source=veiled, truth=render(other), wanted=other.truth, prompt=describe(other))


def edit(maker: Maker, start: Start) -> Case:
    """Another object, on the same way."""
    other = changed(start)
    task = Edit(video=start.video("video", start.frames), strength=maker.edit)
    return start.case(
        maker, task, None, source=start.frames, truth=render(other), wanted=other.truth, prompt=describe(other)
    )


def refine(maker: Maker, start: Start) -> Case:
    """From half the size."""
    height, width = start.frames.shape[1:3]
    small = np.stack([scaled(frame, height // 2, width // 2) for frame in start.frames])
    source = np.stack([scaled(frame, height, width) for frame in small])
    task = Refine(video=start.video("small", small), scale=2.0, strength=maker.refine)
    return start.case(maker, task, None, source=source)


def refine_rate(maker: Maker, start: Start) -> Case:
    """From half the frames a second."""
    half = start.frames[::2]
    task = Refine(video=start.video("slow", half, start.scene.fps / 2), scale=1.0, rate=2, strength=maker.refine)
    return start.case(maker, task, None, source=np.stack(list(between(half, 2))))


def changed(start: Start) -> Scene:
    """Return the scene with an object of another colour and shape, a combination of the same split."""
    (thing,), (sprite,) = start.scene.truth.objects, start.scene.sprites
    others = [
        (color, shape)
        for color, shape, motion in combinations(held=start.split == "heldout")
        if motion == thing.motion and color != thing.color and shape != thing.shape
    ]
    color, shape = others[start.number % len(others)]
    truth = replace(start.scene.truth, objects=(replace(thing, color=color, shape=shape),))
    return replace(start.scene, truth=truth, sprites=(replace(sprite, color=COLORS[color], shape=shape),))


WAYS: dict[str, Callable[[Maker, Start], Case]] = {
    "t2v": t2v,
    "animate": animate,
    "extend": extend,
    "extend back": extend_back,
    "connect": connect,
    "loop": loop,
    "inpaint": inpaint,
    "edit": edit,
    "refine": refine,
    "refine rate": refine_rate,
}
