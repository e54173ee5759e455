"""Find the objects of a clip: what differs from the background, told apart by colour and cut into connected parts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.world.draw import SHADE
from data_prep.world.seen import COLORS, Vocabulary

FOREGROUND = 48.0  # RGB distance from the background at which a pixel may belong to an object
LEAST_AREA = 0.008  # of the frame; less is dirt
LEAST_SHARE = 0.10  # of the largest object; a colour that has less of the core pixels is the rim of another
SAME_COLOR = 60.0  # RGB distance below which the mean colours of two groups of pixels are one colour
LEAST_PART = 0.2  # of the largest connected part of an object; less is dirt
NEUTRAL = ((10, 10, 10), (128, 128, 128), (245, 245, 245))  # an object of these colours has none that we know


@dataclass(frozen=True, eq=False)
class Layer:
    """All that has one colour, over time.

    Attributes:
        color: its name; None where it is none that we know.
        matte: float32 `[T, H, W]`, how much it covers each pixel, its largest connected part only.
        mask: bool `[T, H, W]`, all of it, thin rims too.
        area: float `[T]`, in pixels.
        path: float `[T, 2]`, centroid (x, y) of the largest part; NaN where there is none.
        parts: int `[T]`, how many connected parts there are.
    """

    color: str | None
    matte: np.ndarray
    mask: np.ndarray
    area: np.ndarray
    path: np.ndarray
    parts: np.ndarray

    @property
    def present(self) -> np.ndarray:
        """Bool `[T]`, whether it is there."""
        return self.area > 0.25 * np.quantile(self.area, 0.75)


def smooth(clip: np.ndarray) -> np.ndarray:
    """Return a clip `[T, H, W]` or `[T, H, W, C]` blurred by (1, 2, 1)/4 along height and width."""
    for axis in (1, 2):
        pad = [(0, 0)] * clip.ndim
        pad[axis] = (1, 1)
        wide = np.moveaxis(np.pad(clip, pad, mode="edge"), axis, 0)
        clip = np.moveaxis((wide[:-2] + 2 * wide[1:-1] + wide[2:]) / 4, 0, axis)
    return clip


def sharpen(cover: np.ndarray) -> np.ndarray:
    """Return a soft mask with harder edges at the same places."""
    return np.clip(2 * cover - 0.5, 0, 1)


def grow(mask: np.ndarray, times: int) -> np.ndarray:
    """Return masks `[T, H, W]` with `times` pixels added around."""
    for _ in range(times):
        wide = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = wide[:, 1:-1, 1:-1] | wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
    return mask


def border_color(clip: np.ndarray) -> np.ndarray:
    """Return the median colour of the frames' borders, `[3]`."""
    edges = (clip[:, :2], clip[:, -2:], clip[:, :, :2], clip[:, :, -2:])
    return np.median(np.concatenate([edge.reshape(-1, 3) for edge in edges]), axis=0)


def connected(mask: np.ndarray) -> np.ndarray:
    """Return labels of the 4-connected parts of masks `[T, H, W]`, each unique in its frame; 0 outside.

    Every pixel takes the largest label of its run along x, then of its run along y, until nothing changes.
    """
    count = mask[0].size + 1
    labels = np.where(mask, np.arange(1, count, dtype=np.int64).reshape(mask.shape[1:]), 0)
    if not mask.any():
        return labels
    runs = [
        np.cumsum(np.diff(mask, axis=axis, prepend=False) & mask, axis=axis, dtype=np.int64) * count for axis in (2, 1)
    ]
    while True:
        before = labels
        for axis, run in zip((2, 1), runs, strict=True):
            high = np.maximum.accumulate(np.where(mask, labels + run, 0), axis=axis) - run
            backward = np.flip(np.where(mask, high - run, -run), axis)  # runs fall from here: still one run, one rank
            high = np.flip(np.maximum.accumulate(backward, axis=axis), axis) + run
            labels = np.where(mask, high, 0)
        if (labels == before).all():
            return labels


def find_layers(clip: np.ndarray, ground: np.ndarray, words: Vocabulary) -> list[Layer]:
    """Return the layers of a blurred clip, the largest first.

    A pixel belongs to the colour whose straight way from the background passes nearest to it: at an object's soft
    edge, or where it is blurred, pixels lie on that way too.

    Args:
        clip: float32 `[T, H, W, 3]`, 0 to 255.
        ground: the background's colour.
    """
    away = clip - ground.astype(np.float32)
    length = np.sqrt(np.einsum("thwc,thwc->thw", away, away))
    inside = length > FOREGROUND / 2
    pixels = away[inside]
    shades = (1.0,) if words.textures == ("plain",) else (1.0, SHADE)
    known = [(name, np.multiply(COLORS[name], shade)) for name in words.colors for shade in shades]
    ends = [(name, value) for name, value in (*known, *((None, np.array(value)) for value in NEUTRAL))]
    ends = [(name, value - ground) for name, value in ends if np.linalg.norm(value - ground) > 1.5 * FOREGROUND]
    names = [name for name, _ in ends]
    along, miss = project(pixels, np.array([value for _, value in ends], np.float32))
    core = (miss.argmin(1), (length[inside] > FOREGROUND) & (along.max(1) > 0.5))
    chosen = present_colors(pixels, names, *core, least=LEAST_AREA * clip[..., 0].size / 2)
    layers = []
    if chosen:
        kept = [index for index, name in enumerate(names) if name in chosen]
        group = np.array([chosen.index(names[index]) for index in kept])
        nearest = miss[:, kept].argmin(1)
        for number, name in enumerate(chosen):
            own = group[nearest] == number
            cover = np.take_along_axis(along[:, kept], nearest[:, None], 1)[:, 0]
            if len(shades) == 1:  # what was drawn may be paler than our colour: measure with its own
                solid = own & (cover > 0.6 * np.quantile(cover[own], 0.9))
                color = np.median(pixels[solid], 0)
                if np.linalg.norm(color) > FOREGROUND:
                    cover = project(pixels, color[None])[0][:, 0]
            matte = np.zeros(inside.shape, np.float32)
            matte[inside] = sharpen(np.where(own, cover, 0))
            layers.append(make_layer(name, matte))
    return sorted((layer for layer in layers if layer.area.any()), key=lambda layer: -layer.area.sum())


def project(pixels: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far along the way to each end pixels `[N, 3]` lie, and how far beside it; both `[N, K]`."""
    dots, squares = pixels @ ends.T, (ends**2).sum(1)
    along = np.clip(dots / squares, 0, 1.1)
    return along, (pixels**2).sum(1)[:, None] - 2 * along * dots + along**2 * squares


def present_colors(
    pixels: np.ndarray, names: list[str | None], nearest: np.ndarray, core: np.ndarray, *, least: float
) -> list[str | None]:
    """Return the names of colours that objects have, the largest first; rims and blends are left out."""
    groups: dict[str | None, np.ndarray] = {}
    for name in dict.fromkeys(names):
        groups[name] = core & np.isin(nearest, [index for index, other in enumerate(names) if other == name])
    sizes = {name: int(group.sum()) for name, group in groups.items()}
    most = max(sizes.values())
    chosen: list[str | None] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        if sizes[name] < max(least, LEAST_SHARE * most, 1):
            continue
        mean = pixels[groups[name]].mean(0)
        if all(np.linalg.norm(mean - pixels[groups[other]].mean(0)) > SAME_COLOR for other in chosen):
            chosen.append(name)
    return chosen


def make_layer(name: str | None, matte: np.ndarray) -> Layer:
    """Return a layer with the largest connected part of a matte in each frame; dirt is dropped."""
    frames, height, width = matte.shape
    labels = connected(matte > 0.5)
    parts = np.zeros(frames, int)
    main = np.zeros(matte.shape, bool)
    for index, frame in enumerate(labels):
        found, sizes = np.unique(frame[frame > 0], return_counts=True)
        largest = sizes.max(initial=0)
        if largest >= LEAST_AREA * height * width:
            parts[index] = int((sizes >= LEAST_PART * largest).sum())
            main[index] = frame == found[sizes.argmax()]
    mask = matte > 0.1
    matte = matte * grow(main, 2)
    area = matte.sum((1, 2))
    safe = np.where(area > 0, area, np.nan)
    x = matte.sum(1) @ (np.arange(width) + 0.5) / safe
    y = matte.sum(2) @ (np.arange(height) + 0.5) / safe
    return Layer(name, matte, mask, area, np.stack([x, y], 1), parts)
