"""The clips that stage=evaluate target=captioner describes: of shards with captions, and new scenes of the world."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np

from data_prep.world import Seen, World, describe, render
from data_prep.world.captions import STYLES
from soratrain.data.buckets import Buckets
from soratrain.data.caption_table import open_original_captions
from soratrain.data.captions import first_of
from soratrain.data.reading import described, read_manifest
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError
from soratrain.stages.latents import Groups

ORIGINAL = "gt"  # type of captions that came with a clip, whatever they say
READ = 32  # clips looked up at once
MOVING = ("camera",)  # styles that say nothing of an image
SPLITS = {"seen": "combinations seen in training, new scenes", "heldout": "combinations never seen in training"}


@dataclass(frozen=True, eq=False)
class Item:
    """A clip.

    Attributes:
        name: its key in shards, or which scene it is.
        frames: uint8 `[T, H, W, 3]`.
        captions: (type, text) of the true ones.
        truth: what is to be seen in it, where that is known.
    """

    name: str
    frames: np.ndarray
    fps: float
    captions: tuple[tuple[str, str], ...]
    truth: Seen | None = None


def true_captions(captions: Sequence[tuple[str, str]], style: str, short_bytes: int) -> list[str]:
    """Return the texts of a style among (type, text); one that came with a clip is `short` up to so many bytes."""
    found = []
    for kind, text in captions:
        if kind == ORIGINAL:
            kind = "short" if len(text.encode("utf-8", "replace")) <= short_bytes else "long"
        if kind == style:
            found.append(text)
    return found


def asked_of(styles: Sequence[str], frames: int) -> list[str]:
    """Return the styles that a clip of so many frames is asked for: no image for what its camera does."""
    return [style for style in styles if frames > 1 or style not in MOVING]


class Clips(Protocol):
    """A set of clips, which counts what it leaves out."""

    left_out: Counter[str]

    @property
    def name(self) -> str:
        """What it is called in the report."""
        ...

    @property
    def title(self) -> str:
        """What it is, in words."""
        ...

    def __iter__(self) -> Iterator[Item]:
        """Yield the clips, and count into `left_out`."""
        ...


@dataclass
class OfShards:
    """The first clips of shards, in an order that `seed` draws, that have a caption.

    Attributes:
        places: folders or URLs.
        buckets: how their sizes are chosen; as in training, so that the captioner sees what it saw there.
        remote: how shards in a store are read.
    """

    places: Sequence[str]
    buckets: Buckets
    count: int
    seed: int
    remote: Remote | None = None
    name: str = "shards"
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def title(self) -> str:
        """What they are called."""
        return ", ".join(map(str, self.places))

    def __iter__(self) -> Iterator[Item]:
        """Yield the clips.

        Raises:
            DataError: there are no shards.
        """
        manifest = read_manifest(*self.places)
        assignment = self.buckets.assign(manifest, lambda bucket: 1)
        order = np.concatenate([np.zeros(0, np.int64), *assignment.members])
        bucket_of = np.repeat(np.arange(len(assignment.buckets)), [len(members) for members in assignment.members])
        drawn = iter(np.random.default_rng(self.seed).permutation(len(order)).tolist())
        beside = [table for place in self.places if (table := open_original_captions(place))]
        left = self.count
        while left and (places := list(islice(drawn, READ))):
            groups = [(assignment.buckets[bucket_of[place]], order[place : place + 1]) for place in places]
            clips = Groups(manifest, groups, assignment.stride, self.remote)
            for number in range(len(clips)):
                (clip,) = clips[number][1]
                row = manifest.row(clip.index)
                own = first_of(beside, row.key) or clip.captions
                captions = tuple((item["type"], item["text"]) for item in own if item["text"].strip())
                if clip.video is None or not captions:
                    self.left_out["without a caption" if clip.video is not None else "cannot be read"] += 1
                    continue
                yield Item(row.key, clip.video, row.fps / int(assignment.stride[clip.index]), captions)
                left -= 1
                if not left:
                    return


@dataclass
class OfWorld:
    """New scenes of a split of the world, which no training clip shows, with their truth."""

    world: World
    split: str
    count: int
    left_out: Counter[str] = field(default_factory=Counter)

    @property
    def name(self) -> str:
        """What they are called in the report."""
        return self.split

    @property
    def title(self) -> str:
        """What they are."""
        return SPLITS[self.split]

    def __iter__(self) -> Iterator[Item]:
        """Yield the scenes, rendered."""
        for index in range(self.count):
            scene = self.world.scene(index, self.split)
            captions = tuple((style, text) for style in STYLES if (text := describe(scene, style)))
            yield Item(f"{self.split}/{index}", render(scene), scene.fps, captions, scene.truth)


def world_of(wanted: str | None, seed: int | None, places: Sequence[str]) -> World | None:
    """Return the world to draw scenes from.

    Args:
        wanted: a preset, None for none, or `auto`: that of the shards where they are of the world.
        seed: None takes that of the shards, or 0.

    Raises:
        ConfigError: no such preset.
    """
    settings = [described(place).get("settings", {}) for place in places]
    of_world = [item.get("world", {}) for item in settings if item.get("input") == "world"]
    if wanted == "auto":
        if places and not of_world:
            return None
        wanted = of_world[0].get("preset", "demo") if of_world else "demo"
    if wanted is None:
        return None
    own = [int(item.get("seed", 0)) for item in of_world if item.get("preset") == wanted]
    try:
        return World(preset=wanted, seed=seed if seed is not None else own[0] if own else 0)
    except ConfigError as error:
        raise ConfigError(f"stage.job.world={wanted}: no such preset; use demo, full, auto or null") from error


def batches(clips: Clips, size: int, pixels: int) -> Iterator[list[Item]]:
    """Yield the clips in groups of one shape, at most `size` clips; those held at once have about `pixels` pixels."""
    held: list[Item] = []
    for item in clips:
        held.append(item)
        if len(held) == size or sum(each.frames[..., 0].size for each in held) >= pixels:
            yield from by_shape(held)
            held = []
    yield from by_shape(held)


def by_shape(items: Sequence[Item]) -> list[list[Item]]:
    """Return clips of one shape together."""
    shapes: dict[tuple[int, ...], list[Item]] = {}
    for item in items:
        shapes.setdefault(item.frames.shape, []).append(item)
    return list(shapes.values())
