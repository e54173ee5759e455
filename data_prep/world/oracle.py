"""The oracle: reads from a clip, true, compressed or generated, what is to be seen in it."""

from __future__ import annotations

import numpy as np

from data_prep.world.draw import coverage
from data_prep.world.motion import place_of
from data_prep.world.seen import BACKGROUNDS, VOCABULARIES, Seen, Thing, Vocabulary
from data_prep.world.segment import Layer, border_color, find_layers, grow, sharpen, smooth
from data_prep.world.shapes import AREAS
from data_prep.world.trajectory import STILL, background_shift, direction, read_motion
from soratrain.errors import ConfigError

BACKGROUND_REACH = 60.0  # RGB distance beyond which a background is none that we know
LEAST_IOU = 0.6  # a mask that overlaps no shape better is none of them
PATTERN = 4.0  # standard deviation of brightness above which a background is patterned
ZOOM = 1.35  # growth of areas above which the camera zooms


def measure(frames: np.ndarray, preset: str = "demo") -> Seen:
    """Return what is seen in a clip; never raises for a uint8 clip, whatever it shows.

    Args:
        frames: uint8 `[T, H, W, 3]`; one frame is an image, whose objects have no motion.
        preset: the world whose words are to be used.

    Raises:
        ConfigError: the preset is not known.
    """
    words = vocabulary(preset)
    clip, ground, layers = look(frames, words)
    pattern, camera, shift, scale = "plain", "still", np.zeros((len(clip), 2)), np.ones(len(clip))
    if len(words.cameras) > 1:
        pattern, camera, shift, scale = read_camera(clip, layers)
    centre = np.array([clip.shape[2], clip.shape[1]]) / 2
    things: list[Thing] = []
    for layer in layers:
        others = [other for other in layers if other is not layer]
        things.extend(read_layer(layer, others, words, (shift, scale, centre)))
    return Seen(
        background=nearest_background(ground),
        objects=tuple(things),
        camera=camera if len(frames) > 1 else None,
        pattern=pattern,
    )


def trajectories(frames: np.ndarray, preset: str = "demo") -> dict[str, np.ndarray]:
    """Return where each object's centroid is seen, by the object's colour.

    Args:
        frames: uint8 `[T, H, W, 3]`.

    Returns:
        float `[T, 2]` each, (x, y) in pixels; NaN in frames in which it is not to be seen.
    """
    layers = look(frames, vocabulary(preset))[2]
    return {layer.color: layer.path for layer in layers if layer.color is not None}


def cut_off(frames: np.ndarray, preset: str = "demo") -> bool:
    """Return whether the frame's edge cuts an object in some frame of a clip, uint8 `[T, H, W, 3]`."""
    layers = look(frames, vocabulary(preset))[2]
    return any(bool((layer.matte * rim(layer) > 0.5).any()) for layer in layers)


def rim(layer: Layer) -> np.ndarray:
    """Return the outermost pixels of a layer's frames, bool `[H, W]`."""
    edge = np.ones(layer.matte.shape[1:], bool)
    edge[1:-1, 1:-1] = False
    return edge


def vocabulary(preset: str) -> Vocabulary:
    """Return a preset's words.

    Raises:
        ConfigError: the preset is not known.
    """
    if preset not in VOCABULARIES:
        raise ConfigError(f"a world preset={preset!r} does not exist; use one of {', '.join(VOCABULARIES)}")
    return VOCABULARIES[preset]


def look(frames: np.ndarray, words: Vocabulary) -> tuple[np.ndarray, np.ndarray, list[Layer]]:
    """Return a clip, blurred a little against noise, its background's colour and its objects."""
    clip = smooth(frames.astype(np.float32))
    ground = border_color(clip)
    return clip, ground, find_layers(clip, ground, words)


def nearest_background(value: np.ndarray) -> str | None:
    """Return the nearest background's name; None where none is within reach."""
    distances = {name: float(np.linalg.norm(value - np.array(color))) for name, color in BACKGROUNDS.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= BACKGROUND_REACH else None


def read_layer(
    layer: Layer, others: list[Layer], words: Vocabulary, camera: tuple[np.ndarray, np.ndarray, np.ndarray]
) -> list[Thing]:
    """Return the objects of one colour: one, unless it is in several parts from the beginning."""
    frames, height, width = layer.matte.shape
    present = layer.present
    beside = touching(layer, others)
    whole = present & ~beside if (present & ~beside).sum() >= min(3, frames) else present
    breaks = "breaks" in words.motions and frames > 5 and is_breaking(layer)
    sound = whole & (layer.parts == 1) if (whole & (layer.parts == 1)).any() else whole
    shape = read_shape(layer, sound, words)
    motion = None
    if breaks:
        motion = "breaks"
    elif frames > 1:
        shift, scale, centre = camera
        path = (layer.path - centre - shift) / scale[:, None] + centre
        motion = read_motion(path[whole], np.flatnonzero(whole).astype(float), min(height, width), words)
    place = place_of(layer.path[np.flatnonzero(present)[0]], height, width)
    thing = Thing(layer.color, shape, motion, place=place, lasts=lasting(layer, beside))
    doubles = 0 if breaks else int(np.median(layer.parts[whole])) - 1
    return [thing] + [Thing(layer.color)] * doubles


def touching(layer: Layer, others: list[Layer]) -> np.ndarray:
    """Return in which frames a layer touches another, bool `[T]`."""
    if not others:
        return np.zeros(len(layer.area), bool)
    around = grow(layer.matte > 0.5, 3)
    return np.logical_or.reduce([(around & (other.matte > 0.5)).any((1, 2)) for other in others])


def is_breaking(layer: Layer) -> bool:
    """Whether a layer is one at first and in pieces at last."""
    parts = layer.parts[layer.present]
    third = max(len(parts) // 4, 1)
    return float(np.median(parts[:third])) == 1 and float(np.median(parts[-third:])) >= 3


def lasting(layer: Layer, beside: np.ndarray) -> bool:
    """Whether a layer is there in every frame, or is hidden by another or beyond the edge where it is not."""
    present = layer.present
    excused = beside | (layer.matte * rim(layer) > 0.5).any((1, 2))
    seen = np.flatnonzero(present)
    for index in np.flatnonzero(~present):
        before, after = seen[seen < index], seen[seen > index]
        near = [*before[-2:], *after[:2]]
        if not any(excused[list(near)]):
            return False
    return True


def read_shape(layer: Layer, usable: np.ndarray, words: Vocabulary) -> str | None:
    """Return the shape whose template, at the same place and of the same area, overlaps most in most frames."""
    matte, path, area = layer.matte[usable], layer.path[usable], layer.area[usable]
    height, width = matte.shape[1:]
    scores = {}
    for shape in words.shapes:
        radius = np.sqrt(area / AREAS[shape])
        template = sharpen(smooth(coverage(shape, path, radius, height, width)))
        overlap = np.minimum(matte, template).sum((1, 2)) / np.maximum(matte, template).sum((1, 2))
        scores[shape] = float(np.median(overlap))
    best = max(scores, key=scores.__getitem__)
    return best if scores[best] >= LEAST_IOU else None


def read_camera(clip: np.ndarray, layers: list[Layer]) -> tuple[str, str, np.ndarray, np.ndarray]:
    """Return the background's pattern, what the camera does, and the ground's shift `[T, 2]` and scale `[T]`."""
    frames, height, width = clip.shape[:3]
    free = np.ones(clip.shape[:3], bool)
    for layer in layers:
        free &= ~grow(layer.mask, 2)
    light = smooth(clip.mean(-1))
    shift, scale = np.zeros((frames, 2)), np.ones(frames)
    if free.sum() < 0.1 * free.size or light[free].std() < PATTERN:
        pattern = "plain"
    else:
        pattern = read_pattern(light, free)
        shift = background_shift(light, free)
        if pattern == "striped":  # upright stripes do not show a rise or fall
            shift[:, 1] = 0
    camera = "still"
    ends = [layer.area[[0, -1]] for layer in layers if (layer.present & (layer.parts == 1))[[0, -1]].all()]
    growth = [float(np.log(last / first)) for first, last in ends]
    if growth and frames > 1 and min(np.abs(growth)) > np.log(ZOOM) and np.ptp(np.sign(growth)) == 0:
        camera = "zooms in" if growth[0] > 0 else "zooms out"
        scale = np.exp(np.linspace(0, float(np.median(growth)), frames) / 2)
        shift = np.zeros((frames, 2))
    elif (way := direction(-shift[-1], min(height, width))) not in (None, "still"):
        camera = f"pans {way}"
    elif np.abs(shift).max() < STILL * min(height, width):
        shift = np.zeros((frames, 2))
    return pattern, camera, shift, scale


def read_pattern(light: np.ndarray, free: np.ndarray) -> str:
    """Return the name of a pattern by the directions in which the brightness changes."""
    slopes = []
    for axis in (1, 2):
        low, high = (np.delete(free, end, axis) for end in (0, -1))
        slopes.append(float(np.abs(np.diff(light, axis=axis))[low & high].mean()))
    return "striped" if slopes[0] < 0.5 * slopes[1] else "checkered"
