"""Draw scenes: antialiased from signed distances, so that positions are exact to a fraction of a pixel."""

from __future__ import annotations

import numpy as np

from data_prep.world.scene import Scene

# Half extents (left, right, up, down) from the centroid, in radii; all shapes have nearly the same area.
SQUARE_HALF = 0.88
TRIANGLE_SIDE = 2.6
TRIANGLE_UP = TRIANGLE_SIDE / 3**0.5  # from the centroid of an equilateral triangle to its top corner
EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (SQUARE_HALF,) * 4,
    "triangle": (TRIANGLE_SIDE / 2, TRIANGLE_SIDE / 2, TRIANGLE_UP, TRIANGLE_UP / 2),
}


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Return the signed distance in pixels to a shape's edge, negative inside.

    Args:
        x, y: offsets from the centroid in pixels, of shapes that broadcast; y points down.

    Raises:
        KeyError: the shape is not known.
    """
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "square":
        return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF * radius
    if shape == "triangle":
        sides = np.abs(x) * np.float32(3**0.5 / 2) - y / 2 - TRIANGLE_UP / 2 * radius
        return np.maximum(sides, y - TRIANGLE_UP / 2 * radius)
    raise KeyError(shape)


def coverage(shape: str, path: np.ndarray, radius: float, height: int, width: int) -> np.ndarray:
    """Return how much of every pixel a moving shape covers, float32 `[T, H, W]` from 0 to 1; `path` is `[T, 2]`."""
    x = (np.arange(width) + 0.5 - path[:, :1]).astype(np.float32)[:, None, :]
    y = (np.arange(height) + 0.5 - path[:, 1:]).astype(np.float32)[:, :, None]
    return np.clip(0.5 - distance(shape, x, y, radius), 0, 1)


def render(scene: Scene) -> np.ndarray:
    """Return the clip, uint8 `[T, H, W, 3]`."""
    canvas = np.empty((scene.frames, 3, scene.height, scene.width), np.float32)
    canvas[:] = np.array(scene.background, np.float32)[:, None, None]
    for sprite in scene.sprites:
        cover = coverage(sprite.shape, sprite.path, sprite.radius, scene.height, scene.width)
        color = np.array(sprite.color, np.float32)[:, None, None]
        canvas += cover[:, None] * (color - canvas)
    return (canvas + 0.5).astype(np.uint8).transpose(0, 2, 3, 1).copy()
