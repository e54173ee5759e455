"""The shapes, as signed distances, so that they are drawn with exact positions and soft edges at any size."""

from __future__ import annotations

import math

import numpy as np

SQUARE_HALF = 0.88
TRIANGLE_SIDE = 2.6
TRIANGLE_UP = TRIANGLE_SIDE / 3**0.5  # from the centroid of an equilateral triangle to its top corner
STAR_TIP = 1.35
STAR_NOTCH = 0.5  # inner radius over outer
CROSS_LONG, CROSS_WIDE = 1.14, 0.42  # half the length and half the width of its bars

# Extents (left, right, up, down) from the centroid, in radii.
EXTENTS = {
    "circle": (1.0, 1.0, 1.0, 1.0),
    "square": (SQUARE_HALF,) * 4,
    "triangle": (TRIANGLE_SIDE / 2, TRIANGLE_SIDE / 2, TRIANGLE_UP, TRIANGLE_UP / 2),
    "star": (STAR_TIP * 0.951, STAR_TIP * 0.951, STAR_TIP, STAR_TIP * 0.809),
    "cross": (CROSS_LONG,) * 4,
}
# Area at radius 1.
AREAS = {
    "circle": math.pi,
    "square": 4 * SQUARE_HALF**2,
    "triangle": math.sqrt(3) / 4 * TRIANGLE_SIDE**2,
    "star": 5 * STAR_TIP**2 * STAR_NOTCH * math.sin(math.pi / 5),
    "cross": 8 * CROSS_LONG * CROSS_WIDE - 4 * CROSS_WIDE**2,
}

Radius = float | np.ndarray


def distance(shape: str, x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Return the signed distance in pixels to a shape's edge, negative inside.

    Args:
        x, y: offsets from the centroid in pixels, y pointing down; they and `radius` broadcast.

    Raises:
        KeyError: the shape is not known.
    """
    return SHAPE_DISTANCES[shape](x, y, radius)


def circle(x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Signed distance to a circle."""
    return np.sqrt(x * x + y * y) - radius


def square(x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Distance to a square's nearest edge line, exact but at corners outside."""
    return np.maximum(np.abs(x), np.abs(y)) - SQUARE_HALF * radius


def triangle(x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Distance to the nearest edge line of an equilateral triangle that points up."""
    sides = np.abs(x) * np.float32(3**0.5 / 2) - y / 2
    return np.maximum(sides, y) - TRIANGLE_UP / 2 * radius


def star(x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Distance to a five-pointed star: every point is folded into one half of one point, whose edge is a line."""
    turn = 2 * math.pi / 5
    angle = np.arctan2(x, -y)  # 0 at the upper tip
    folded = np.abs((angle + turn / 2) % turn - turn / 2)
    reach = np.sqrt(x * x + y * y)
    inner = STAR_TIP * STAR_NOTCH
    along = np.array([inner * math.sin(turn / 2), inner * math.cos(turn / 2) - STAR_TIP])  # from tip to notch
    along /= np.hypot(*along)
    across, up = reach * np.sin(folded), reach * np.cos(folded) - STAR_TIP * radius
    return up * np.float32(along[0]) - across * np.float32(along[1])


def cross(x: np.ndarray, y: np.ndarray, radius: Radius) -> np.ndarray:
    """Distance to an upright cross of two bars."""
    x, y = np.abs(x), np.abs(y)
    lying = np.maximum(x - CROSS_LONG * radius, y - CROSS_WIDE * radius)
    standing = np.maximum(x - CROSS_WIDE * radius, y - CROSS_LONG * radius)
    return np.minimum(lying, standing)


SHAPE_DISTANCES = {"circle": circle, "square": square, "triangle": triangle, "star": star, "cross": cross}
