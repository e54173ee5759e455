"""Draw scenes: antialiased from signed distances, so that positions are exact to a fraction of a pixel."""

from __future__ import annotations

import numpy as np

from data_prep.world.scene import Scene, Sprite
from data_prep.world.shapes import Radius, distance

REACH = 1.6  # radii from the centroid within which every shape lies, turned or not
SHADE = 0.68  # brightness of the darker tone of textures
CONTRAST = 10.0  # of a background's pattern: each of its two tones is so far from the background's colour


def coverage(
    shape: str, path: np.ndarray, radius: Radius, height: int, width: int, angle: np.ndarray | None = None
) -> np.ndarray:
    """Return how much of every pixel a moving shape covers, float32 `[T, H, W]` from 0 to 1.

    Args:
        path: `[T, 2]`, (x, y) of the centroid in pixels.
        radius: in pixels, one number or `[T]`.
        angle: clockwise turn in radians, `[T]`.
    """
    x, y = offsets(path, height, width, angle)
    return np.clip(0.5 - distance(shape, x, y, per_frame(radius)), 0, 1)


def per_frame(value: Radius) -> Radius:
    """Return a value so that it broadcasts with `[T, H, W]`."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1) if isinstance(value, np.ndarray) else value


def offsets(
    path: np.ndarray, height: int, width: int, angle: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the pixels' offsets from a moving, turning point, in arrays that broadcast to `[T, H, W]`."""
    x = (np.arange(width) + 0.5 - path[:, :1]).astype(np.float32)[:, None, :]
    y = (np.arange(height) + 0.5 - path[:, 1:]).astype(np.float32)[:, :, None]
    if angle is None:
        return x, y
    cos, sin = (f(angle).astype(np.float32)[:, None, None] for f in (np.cos, np.sin))
    return cos * x + sin * y, cos * y - sin * x


def render(scene: Scene) -> np.ndarray:
    """Return the clip, uint8 `[T, H, W, 3]`."""
    canvas = np.empty((scene.frames, 3, scene.height, scene.width), np.float32)
    canvas[:] = np.array(scene.background, np.float32)[:, None, None]
    if scene.pattern != "plain":
        canvas += CONTRAST * pattern(scene)[:, None]
    for sprite in scene.sprites:
        draw(canvas, scene, sprite)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1).copy()


def draw(canvas: np.ndarray, scene: Scene, sprite: Sprite) -> None:
    """Draw a sprite onto a canvas `[T, 3, H, W]`, working only within the box that it ever touches."""
    radius: Radius = sprite.radius
    if scene.view is not None:
        radius = sprite.radius * scene.view[:, 2]
    path = scene.on_screen(sprite.path)
    reach = REACH * float(np.max(radius)) + 1
    first = np.floor(path.min(0) - reach).astype(int).clip(0)
    last = np.ceil(path.max(0) + reach).astype(int).clip(0, (scene.width, scene.height))
    part = canvas[:, :, first[1] : last[1], first[0] : last[0]]
    height, width = part.shape[2:]
    x, y = offsets(path - first, height, width, sprite.angle)
    cover = np.clip(0.5 - distance(sprite.shape, x, y, per_frame(radius)), 0, 1)
    if sprite.present is not None:
        cover = cover * sprite.present[:, None, None]
    color: np.ndarray = np.array(sprite.color, np.float32)[:, None, None]
    if sprite.texture != "plain":
        dark = texture(sprite.texture, x, y, per_frame(radius))
        color = color * (1 - (1 - SHADE) * dark[:, None])
    part += cover[:, None] * (color - part)


def texture(name: str, x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Return where a texture is dark, 0 to 1 with soft edges; `x` and `y` are offsets from the centroid in pixels.

    Raises:
        KeyError: the texture is not known.
    """
    if name == "striped":  # upright bars, five across a circle
        period = 0.8 * radius
        return np.clip(0.5 + (np.abs((x / period) % 1 - 0.5) - 0.25) * period, 0, 1) + 0 * y
    if name == "spotted":  # dots on a square grid
        period = 0.84 * radius
        u, v = ((value / period) % 1 - 0.5 for value in (x, y))
        return np.clip(0.5 - (np.sqrt(u * u + v * v) - 0.3) * period, 0, 1)
    raise KeyError(name)


def pattern(scene: Scene) -> np.ndarray:
    """Return the background's pattern `[T, H, W]`, from -1 to 1 with soft edges; it moves as the camera demands."""
    period = max(16.0, min(scene.height, scene.width) / 4)
    centre = np.array([[scene.width, scene.height]]) / 2
    rest = np.repeat(np.array([[0.0, 0.0, 1.0]]), scene.frames, 0)
    view = rest if scene.view is None else scene.view
    x, y = offsets(np.repeat(centre, scene.frames, 0), scene.height, scene.width)
    zoom = view[:, 2, None, None].astype(np.float32)
    waves = []
    for value, offset in ((x, view[:, 0]), (y, view[:, 1])):
        place = value / zoom + offset[:, None, None].astype(np.float32)
        waves.append(np.clip((np.abs((place / period) % 1 - 0.5) - 0.25) * period * zoom, -0.5, 0.5) * 2)
    return waves[0] + 0 * waves[1] if scene.pattern == "striped" else waves[0] * waves[1]
