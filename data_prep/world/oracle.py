"""The oracle: reads from a clip what is to be seen in it."""

from __future__ import annotations

import numpy as np

from data_prep.world.draw import coverage
from data_prep.world.seen import BACKGROUNDS, COLORS, SHAPES, Seen, Thing
from data_prep.world.shapes import AREAS

BACKGROUND_REACH = 60.0  # RGB distance beyond which a background is none that we know
FOREGROUND = 48.0  # RGB distance from the background at which a pixel may belong to an object
LEAST_AREA = 0.02  # of the frame; less is dirt
STILL = 0.10  # of the shorter side: a centroid that moves less stands still
LEAST_IOU = 0.6  # a mask that fits no shape better is none of them


def measure(frames: np.ndarray) -> Seen:
    """Return what is seen in a clip.

    Args:
        frames: uint8 `[T, H, W, 3]`; any content, one frame is an image (whose object has no motion).
    """
    clip = smooth(frames.astype(np.float32))
    ground = np.median(
        np.concatenate(
            [
                clip[:, :2].reshape(-1, 3),
                clip[:, -2:].reshape(-1, 3),
                clip[:, :, :2].reshape(-1, 3),
                clip[:, :, -2:].reshape(-1, 3),
            ]
        ),
        axis=0,
    )
    background = nearest(ground, BACKGROUNDS, BACKGROUND_REACH)
    far = np.linalg.norm(clip - ground, axis=-1)
    mask = largest(far > FOREGROUND)
    if mask.mean() < LEAST_AREA:
        return Seen(background, ())
    core = clip[mask & (far >= np.quantile(far[mask], 0.4))]
    color_value = np.median(core, axis=0)
    way = color_value - ground
    matte = np.clip((clip - ground) @ way / float(way @ way), 0, 1)
    matte *= mask | grow(mask)
    matte[matte < 0.1] = 0
    area = matte.sum((1, 2))
    present = area > LEAST_AREA * matte[0].size
    if not present.any():
        return Seen(background, ())
    path = centroids(matte, area)
    shape = read_shape(matte[present], path[present], area[present])
    motion = read_motion(path, present, *frames.shape[1:3]) if len(frames) > 1 else None
    return Seen(background, (Thing(read_color(color_value), shape, motion),))


def smooth(clip: np.ndarray) -> np.ndarray:
    """Return the clip blurred by (1, 2, 1)/4 along height and width."""
    for axis in (1, 2):
        pad = [(0, 0)] * 4
        pad[axis] = (1, 1)
        wide = np.pad(clip, pad, mode="edge")
        size = clip.shape[axis]
        parts = [np.take(wide, range(i, i + size), axis) for i in range(3)]
        clip = (parts[0] + 2 * parts[1] + parts[2]) / 4
    return clip


def grow(mask: np.ndarray, times: int = 2) -> np.ndarray:
    """Return the mask with `times` pixels added around it."""
    for _ in range(times):
        wide = np.pad(mask, ((0, 0), (1, 1), (1, 1)))
        mask = wide[:, 1:-1, 1:-1] | wide[:, :-2, 1:-1] | wide[:, 2:, 1:-1] | wide[:, 1:-1, :-2] | wide[:, 1:-1, 2:]
    return mask


def largest(mask: np.ndarray) -> np.ndarray:
    """Return, of every frame's mask `[T, H, W]`, the largest connected part."""
    labels = np.where(mask, np.arange(1, mask[0].size + 1).reshape(mask.shape[1:]), 0)
    while True:
        wide = np.pad(labels, ((0, 0), (1, 1), (1, 1)))
        best = np.maximum.reduce(
            [wide[:, 1:-1, 1:-1], wide[:, :-2, 1:-1], wide[:, 2:, 1:-1], wide[:, 1:-1, :-2], wide[:, 1:-1, 2:]]
        )
        best = np.where(mask, best, 0)
        if (best == labels).all():
            break
        labels = best
    kept = np.zeros_like(mask)
    for index, frame in enumerate(labels):
        sizes = np.bincount(frame.ravel())
        sizes[0] = 0
        if sizes.max(initial=0):
            kept[index] = frame == sizes.argmax()
    return kept


def nearest(value: np.ndarray, palette: dict[str, tuple[int, int, int]], reach: float) -> str | None:
    """Return the palette's nearest colour, None where none is within reach."""
    distances = {name: float(np.linalg.norm(value - np.array(color))) for name, color in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= reach else None


def read_color(value: np.ndarray) -> str | None:
    """Return the name of an object's colour, by its direction away from grey; None for grey itself."""
    chroma = value - value.mean()
    if np.linalg.norm(chroma) < 30:
        return None
    scores = {}
    for name, color in COLORS.items():
        other = np.array(color, np.float64) - np.mean(color)
        scores[name] = float(chroma @ other / np.linalg.norm(chroma) / np.linalg.norm(other))
    return max(scores, key=scores.__getitem__)


def centroids(matte: np.ndarray, area: np.ndarray) -> np.ndarray:
    """Return the centroid (x, y) of every frame's matte, `[T, 2]`; NaN where it is empty."""
    height, width = matte.shape[1:]
    safe = np.where(area > 0, area, np.nan)
    x = matte.sum(1) @ (np.arange(width) + 0.5) / safe
    y = matte.sum(2) @ (np.arange(height) + 0.5) / safe
    return np.stack([x, y], axis=1)


def read_shape(matte: np.ndarray, path: np.ndarray, area: np.ndarray) -> str | None:
    """Return the shape whose template, at the same place and area, overlaps most over all frames."""
    height, width = matte.shape[1:]
    scores = {}
    for shape in SHAPES:
        radius = float(np.sqrt(np.median(area) / AREAS[shape]))
        template = smooth(coverage(shape, path, radius, height, width)[..., None])[..., 0]
        overlap = np.minimum(matte, template).sum((1, 2)) / np.maximum(matte, template).sum((1, 2))
        scores[shape] = float(np.median(overlap))
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= LEAST_IOU else None


def read_motion(path: np.ndarray, present: np.ndarray, height: int, width: int) -> str | None:
    """Return the name of a trajectory; None where it is none of ours."""
    path = path[present]
    if len(path) < 2:
        return None
    unit = min(height, width)
    y = path[:, 1]
    fall = y - np.minimum.accumulate(y)
    rise = y - np.minimum.accumulate(y[::-1])[::-1]
    if np.minimum(fall, rise).max() > STILL * unit:
        return "bounces"
    way = path[-1] - path[0]
    if np.abs(way).max() < STILL * unit:
        return "still"
    if abs(way[0]) > abs(way[1]):
        return "right" if way[0] > 0 else "left"
    return "down" if way[1] > 0 else "up"
