"""How pictures of any size come to the size that is drawn, and masks with them. Pure functions of pixels.

One rule: a picture is scaled to cover the size and its middle is taken, so that nothing is stretched and no border is
seen. To paint around it, it is scaled to lie inside instead.

Legend: H W height, width in pixels. Pictures are uint8 `[H, W, 3]`, masks bool `[H, W]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import cv2
import numpy as np

from soratrain.errors import ConfigError

SAME_ASPECT = 0.02  # ratios this near are the same: rounding a size to whole pixels moves them
TRACE = 1e-3  # share of a pixel from which on it counts: an 8-bit colour shows no less
FEATHER = 8  # pixels around a mask in which what was drawn passes into what was there


def scaled(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture or a mask at another size: areas averaged where it shrinks, bicubic where it grows.

    A mask hides every pixel that anything it hides has gone into: a line too thin for the size is still hidden.
    """
    if picture.shape[:2] == (height, width):
        return picture
    smaller = height * width < picture.shape[0] * picture.shape[1]
    how = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    if picture.dtype == bool:
        share: np.ndarray = picture.astype(np.float32)
        if not smaller:  # bicubic looks two pixels far, bilinear one: without its changes of sign, where it is 0
            share, how = cv2.dilate(share, np.ones((3, 3))), cv2.INTER_LINEAR
        return cv2.resize(share, (width, height), interpolation=how) > TRACE
    return cv2.resize(picture, (width, height), interpolation=how)


def cover(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture or a mask scaled to cover (height, width), its middle taken."""
    high, wide = picture.shape[:2]
    scale = max(height / high, width / wide)
    picture = scaled(picture, max(round(high * scale), height), max(round(wide * scale), width))
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]


def inside(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Return a picture or a mask scaled to lie inside (height, width), in its middle; around it 0."""
    high, wide = picture.shape[:2]
    scale = min(height / high, width / wide)
    picture = scaled(picture, min(round(high * scale), height), min(round(wide * scale), width))
    framed = np.zeros((height, width, *picture.shape[2:]), picture.dtype)
    top, left = (height - picture.shape[0]) // 2, (width - picture.shape[1]) // 2
    framed[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return framed


def said_of(height: int, width: int, high: int, wide: int) -> str:
    """Return in words what `cover` does to a picture of (high, wide); empty where it does nothing."""
    if (height, width) == (high, wide):
        return ""
    scale = max(height / high, width / wide)
    over = (max(round(high * scale), height) - height, max(round(wide * scale), width) - width)
    cut = [f"{count} {name}" for count, name in zip(over, ("rows", "columns"), strict=True) if count]
    cropped = f", {' and '.join(cut)} cropped around its middle" if cut else ""
    return f"{wide}x{high} scaled by {scale:.3g}{cropped}, to {width}x{height}"


def size_near(height: int, width: int, area: int, unit: Sequence[int], *, grow: bool) -> tuple[int, int]:
    """Return the size on the grid that is nearest to a picture's aspect ratio, of about `area` pixels.

    Args:
        unit: rows and columns of the grid.
        grow: whether a picture smaller than `area` is made larger.
    """
    scale = math.sqrt(area / (height * width))
    if not grow:
        scale = min(scale, 1.0)
    rows, columns = (side * scale / step for side, step in zip((height, width), unit, strict=True))
    return max(round(rows), 1) * unit[0], max(round(columns), 1) * unit[1]


def same_aspect(height: int, width: int, high: int, wide: int) -> bool:
    """Return whether two sizes have one aspect ratio, to within a pixel's rounding."""
    return abs(math.log(width / height * high / wide)) <= SAME_ASPECT + 1 / min(high, wide)


def every(rate: Fraction, fps: float | None, key: str) -> int:
    """Return of how many frames of a video one is taken to come to `fps`; None takes all.

    Raises:
        ConfigError: its rate is no multiple of that; names those that it is.
    """
    stride = 1 if fps is None else max(round(float(rate) / fps), 1)
    if fps is not None and abs(float(rate) / stride / fps - 1) > 1e-3:
        near = ", ".join(f"{float(rate) / part:g}" for part in range(1, 5))
        raise ConfigError(f"fps={fps:g}: {key} has {float(rate):g} frames a second; use one of {near}, or leave it out")
    return stride


def filled(picture: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return a picture in which what a mask hides continues the colours around it, softly."""
    if not mask.any():
        return picture
    seen = (~mask).astype(np.float32)
    if not seen.any():
        return np.full_like(picture, 128)
    values = picture.astype(np.float32) * seen[..., None]
    hidden, result = mask.copy(), picture.astype(np.float32)
    radius = 1.0
    while hidden.any():  # each round reaches twice as far
        weight = cv2.GaussianBlur(seen, (0, 0), radius, borderType=cv2.BORDER_REFLECT)
        mean = cv2.GaussianBlur(values, (0, 0), radius, borderType=cv2.BORDER_REFLECT)
        reached = hidden & (weight > 1e-2)
        result[reached] = mean[reached] / weight[reached][:, None]
        hidden &= ~reached
        radius *= 2
    return result.round().clip(0, 255).astype(np.uint8)


def feathered(mask: np.ndarray) -> np.ndarray:
    """Return the share `[H, W, 1]` of what was drawn: 1 under a mask, 0 from `FEATHER` pixels beside it."""
    if not mask.any():
        return np.zeros((*mask.shape, 1), np.float32)
    away = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
    return np.clip(1 - away / FEATHER, 0, 1)[..., None]


def mixed(picture: np.ndarray, other: np.ndarray, share: np.ndarray | float) -> np.ndarray:
    """Return a picture with a share of another; where that is 0 it is bit for bit the picture."""
    blend = picture.astype(np.float32) * (1 - share) + other.astype(np.float32) * share
    return blend.round().clip(0, 255).astype(np.uint8)
