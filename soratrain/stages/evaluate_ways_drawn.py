"""Draw cases as `stage=sample` does, and see meanwhile whether what is given stays what it is, to the bit.

Three things are compared. What the net is given, before and after it was drawn from. What is decoded, against the given
frames encoded by themselves. And the frames that come out, where the way promises the file's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from soratrain.batch import draw_of
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.rolling import noise_of
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.ways import TIME, Layout
from soratrain.stages.evaluate_ways_cases import Case
from soratrain.stages.sample_fit import cover, feathered
from soratrain.stages.sample_inputs import Picture
from soratrain.stages.sample_joints import RAMP, Backwards, Bridged, Joined, beginning
from soratrain.stages.sample_redrawn import Inpainted
from soratrain.stages.sample_tasks import Animated, Scene


@dataclass(frozen=True, eq=False)
class Drawn:
    """A case, drawn.

    Attributes:
        frames: uint8 `[T, H, W, 3]`.
        latent: greatest difference of a given latent from what it was; None where the way gives none.
        pixels: greatest difference of the frames from the file's own, in levels, where the way promises these.
        promised: how many pixels these are.
        windows: the frames after which another window was drawn.
        noise: level from which it was drawn, 1 being noise alone.
    """

    case: Case
    frames: np.ndarray
    latent: float | None = None
    pixels: int | None = None
    promised: int = 0
    windows: tuple[int, ...] = ()
    noise: float = 1.0


class Watched(Generator):
    """A generator that keeps the latents that it decodes, stream by stream."""

    def __init__(self, generate: Generator) -> None:
        nets = generate.vae, generate.dit, generate.text
        batch, precision = generate.batch, generate.precision
        super().__init__(*nets, objective=generate.objective, batch=batch, precision=precision)
        self.streams: list[list[Tensor]] = []

    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[np.ndarray]:
        stream: list[Tensor] = []
        self.streams.append(stream)

        def noted() -> Iterator[Tensor]:
            for latent in latents:
                stream.append(latent)
                yield latent

        return super().decode_stream(noted())


def draw_cases(
    generate: Generator, cases: Sequence[Case], sampler: Sampler, seed: int, step: Callable[[int], None]
) -> list[Drawn]:
    """Return the cases drawn, in their order; those of one shape are drawn together.

    Args:
        step: told how many cases are done.
    """
    watched = Watched(generate)
    scenes = [case.task.scene(case.order) for case in cases]
    groups: dict[object, list[int]] = {}
    for number, scene in enumerate(scenes):
        scene.check(generate)
        groups.setdefault((cases[number].way, scene.key()), []).append(number)
    done: dict[int, Drawn] = {}
    for numbers in groups.values():
        for start in range(0, len(numbers), generate.batch):
            some = numbers[start : start + generate.batch]
            pairs = [(cases[number], scenes[number]) for number in some]
            draw = rolled if isinstance(pairs[0][1], Joined) else together
            done.update(zip(some, draw(watched, pairs, sampler, seed), strict=True))
            step(len(some))
    return [done[number] for number in range(len(cases))]


class Asked(Exception):
    """A scene that rolls has come to a window that is not drawn yet."""

    def __init__(self, layout: Layout) -> None:
        super().__init__()
        self.layout = layout


def rolled(watched: Watched, pairs: Sequence[tuple[Case, Scene]], sampler: Sampler, seed: int) -> list[Drawn]:
    """Return cases that roll, of one shape: each is played anew up to its next window, which all then draw at once."""
    windows: list[list[Tensor]] = [[] for _ in pairs]
    changes: list[list[float]] = [[] for _ in pairs]
    prompts = [case.prompt for case, _ in pairs]
    draws = [draw_of(seed, prompt) for prompt in prompts]
    while True:
        found: list[Drawn] = []
        asked: list[Layout] = []
        for (case, scene), drawn, changed in zip(pairs, windows, changes, strict=True):
            assert isinstance(scene, Joined)
            try:
                found.append(played(watched, case, scene, drawn, changed))
            except Asked as question:
                asked.append(question.layout)
        if not asked:
            return found
        kept = [copies(layout) for layout in asked]
        latents = watched.draw(asked, prompts, draws, sampler, name=noise_of(len(windows[0])))
        for index, latent in enumerate(latents):
            windows[index].append(latent)
            changes[index].append(change(asked[index], kept[index], latent))


def played(watched: Watched, case: Case, scene: Joined, windows: Sequence[Tensor], changes: Sequence[float]) -> Drawn:
    """Return a case that rolls from its drawn windows.

    Raises:
        Asked: there must be more of them.
    """
    left = iter(windows)

    def draw(layout: Layout, name: str) -> Tensor:
        drawn = next(left, None)
        if drawn is None:
            raise Asked(layout)
        return drawn

    watched.streams.clear()
    frames = np.stack(list(scene.play(watched, draw)))
    streams = [torch.cat(stream, dim=1) for stream in watched.streams]
    changes = [*changes, *(found_in(streams, latent) for latent in alone(watched, scene))]
    count, first, steps = len(frames), scene.taken[0].frames, [part.shape[1] for part in windows]
    if isinstance(scene, Backwards):
        ends = count - first - TIME * np.cumsum([part - 1 for part in steps])[:-1]
    else:
        ends = first + TIME * np.cumsum(steps)[:-1]
    loops = isinstance(scene, Bridged) and scene.taken[0] is scene.taken[1]
    differs = np.abs(frames.astype(int) - files_own(scene, count))[~near_drawn(case.given, loops)]
    pixels = int(differs.max()) if differs.size else None
    return Drawn(case, frames, max(changes), pixels, differs.size // 3, tuple(ends.tolist()))


def together(watched: Watched, pairs: Sequence[tuple[Case, Scene]], sampler: Sampler, seed: int) -> Iterator[Drawn]:
    """Yield cases of one shape, drawn at once."""
    layouts = [scene.layout(watched) for _, scene in pairs]
    kept = [copies(layout) for layout in layouts]
    prompts = [case.prompt for case, _ in pairs]
    draws, strength = [draw_of(seed, prompt) for prompt in prompts], pairs[0][1].strength
    tokens = layouts[0].positions // watched.dit.patch_size
    noise = float(sampler.levels(watched.objective, tokens, strength)[0]) if strength < 1 else 1.0
    latents = watched.draw(layouts, prompts, draws, sampler, strength=strength)
    for (case, scene), layout, before, latent in zip(pairs, layouts, kept, latents, strict=True):
        watched.streams.clear()
        frames = np.stack(list(scene.show(watched, layout, latent)))
        changes = [change(layout, before, latent)] if layout.given or layout.known is not None else []
        streams = [torch.cat(stream, dim=1) for stream in watched.streams]
        changes += [found_in(streams, given) for given in alone(watched, scene)]
        pixels, promised = None, 0
        if isinstance(scene, Inpainted):
            pairs_of = zip(frames, scene.originals(), scene.hidden(), strict=True)
            outside = [np.abs(frame.astype(int) - own)[feathered(mask)[..., 0] == 0] for frame, own, mask in pairs_of]
            promised = sum(map(len, outside))
            pixels = max(int(part.max(initial=0)) for part in outside) if promised else None
        yield Drawn(case, frames, max(changes) if changes else None, pixels, promised, noise=noise)


def copies(layout: Layout) -> list[Tensor]:
    """Return copies of what is given."""
    known = [] if layout.base is None or layout.known is None else [layout.base.clone()]
    return [given.latent.clone() for given in layout.given] + known


def change(layout: Layout, kept: Sequence[Tensor], drawn: Tensor) -> float:
    """Return the greatest difference of what is given from `kept`, and of known positions in what was drawn."""
    whole = kept[: len(layout.given)]  # after them, where there are known positions, the base
    gaps = [(given.latent - old).abs().max() for given, old in zip(layout.given, whole, strict=True)]
    if layout.known is not None and layout.known.any():
        gaps.append((drawn.cpu() - kept[-1].cpu()).abs()[:, layout.known.cpu()].max())
    return max((float(gap) for gap in gaps), default=0.0)


def alone(watched: Watched, scene: Scene) -> list[Tensor]:
    """Return the latents of the given stretches that are decoded, each encoded by itself."""
    if isinstance(scene, Animated):
        (picture,) = scene.inputs
        assert isinstance(picture, Picture)
        return [watched.encoded([cover(picture.pixels, scene.height, scene.width)])]
    if not isinstance(scene, Joined):
        return []
    found = []
    if not isinstance(scene, Backwards):
        first = scene.taken[0]
        found.append(watched.encoded(islice(first.read(), (first.frames - 1) % TIME, None)))
    if isinstance(scene, Backwards | Bridged):
        found.append(beginning(watched, scene.taken[-1], scene.context))
    return found


def found_in(streams: Sequence[Tensor], latent: Tensor) -> float:
    """Return how far a latent `[C, t, h, w]` is from the beginning of the stream that begins most like it."""
    size = latent.shape[1]
    heads = [stream[:, :size] for stream in streams if stream.shape[1] >= size]
    return min((float((head.cpu() - latent.cpu()).abs().max()) for head in heads), default=float("inf"))


def files_own(scene: Joined, count: int) -> np.ndarray:
    """Return the frames of the files at their places in a clip of `count`; what is drawn is black."""
    videos = [np.stack(list(taken.read())) for taken in dict.fromkeys(scene.taken)]
    frames = np.zeros((count, *videos[0].shape[1:]), np.uint8)
    for number, video in enumerate(videos):
        at = count - len(video) if number or isinstance(scene, Backwards) else 0
        frames[at : at + len(video)] = video
    return frames


def near_drawn(given: np.ndarray, round_and_round: bool) -> np.ndarray:
    """Return which frames are drawn, or within `RAMP` of one that is, bool `[T]`."""
    count, where = len(given), np.flatnonzero(~given)
    gaps = np.abs(np.arange(count)[:, None] - where)
    if round_and_round:
        gaps = np.minimum(gaps, count - gaps)
    return gaps.min(1) <= RAMP
