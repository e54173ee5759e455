"""Pictures of an original beside its reconstruction: frames over each other with a map of the error, and a video."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from soratrain.sheet import FAINT, GAP, INK, MARGIN, PAPER, fit

TALL = 160  # pixels: of a frame in the strip
VIDEO_TALL = 256  # smaller frames are enlarged by a whole number at least to this, so that 4:2:0 takes no colour
SIDE = 132  # pixels left of the strip, for the rows' names
LEAST_SCALE = 8  # grey levels: a nearly perfect picture is not blown up into noise
# magma of matplotlib, at equal distances: even steps of error look like even steps of brightness
MAGMA = np.array(
    [
        (0, 0, 4),
        (28, 16, 68),
        (79, 18, 123),
        (129, 37, 129),
        (181, 54, 122),
        (229, 80, 100),
        (251, 135, 97),
        (254, 194, 135),
        (252, 253, 191),
    ],
    dtype=np.float64,
)


@dataclass(frozen=True)
class Column:
    """One frame of the strip: a heading, a note below it, and uint8 `[H, W, 3]` of both."""

    heading: str
    note: str
    original: np.ndarray
    rebuilt: np.ndarray

    def error(self) -> np.ndarray:
        """Return the absolute error of each pixel, a mean over R, G and B in grey levels, `[H, W]`."""
        return np.abs(self.original.astype(np.float64) - self.rebuilt.astype(np.float64)).mean(2)


def heat(error: np.ndarray, top: float) -> np.ndarray:
    """Return errors `[...]` as colours uint8 `[..., 3]`, 0 the darkest, `top` and all above it the lightest."""
    place = np.clip(error / top, 0, 1) * (len(MAGMA) - 1)
    low = np.minimum(place.astype(int), len(MAGMA) - 2)
    part = (place - low)[..., None]
    return np.round(MAGMA[low] * (1 - part) + MAGMA[low + 1] * part).astype(np.uint8)


def scale_top(errors: Sequence[np.ndarray]) -> int:
    """Return the colour scale's upper end: a power of two that all but a thousandth of the errors lie below."""
    high = max(float(np.quantile(np.concatenate([error.ravel() for error in errors]), 0.999)), LEAST_SCALE)
    return 2 ** int(np.ceil(np.log2(high)))


def draw(path: Path, title: str, notes: Sequence[str], columns: Sequence[Column]) -> None:
    """Draw frames as PNG: the original, its reconstruction, and the error with a scale that says its numbers."""
    fonts = {size: ImageFont.load_default(size) for size in (24, 15, 13)}
    errors = [column.error() for column in columns]
    top = scale_top(errors)
    high, wide = columns[0].original.shape[:2]
    width = max(1, round(wide * TALL / high))
    each = max(width, 72)  # a heading is never wider
    canvas = max(2 * MARGIN + SIDE + len(columns) * (each + GAP), 640)
    head = MARGIN + 40 + 22 * len(notes) + 10
    sheet = Image.new("RGB", (canvas, head + 46 + 3 * (TALL + GAP) + 76 + MARGIN), PAPER)
    pen = ImageDraw.Draw(sheet)
    pen.text((MARGIN, MARGIN - 6), fit(pen, title, fonts[24], canvas - 2 * MARGIN), INK, fonts[24])
    for line, note in enumerate(notes):
        pen.text((MARGIN, MARGIN + 34 + 22 * line), fit(pen, note, fonts[15], canvas - 2 * MARGIN), FAINT, fonts[15])
    for line, name in enumerate(("original", "reconstruction", "error")):
        pen.text((MARGIN, head + 46 + line * (TALL + GAP) + TALL // 2 - 9), name, INK, fonts[15])
    for number, (column, error) in enumerate(zip(columns, errors, strict=True)):
        left = MARGIN + SIDE + number * (each + GAP)
        pen.text((left, head), column.heading, INK, fonts[15])
        pen.text((left, head + 21), column.note, FAINT, fonts[13])
        for line, picture in enumerate((column.original, column.rebuilt, heat(error, top))):
            sheet.paste(resized(picture, width, TALL), (left, head + 46 + line * (TALL + GAP)))
    bar(sheet, pen, head + 46 + 3 * (TALL + GAP) + 14, top, canvas, fonts[13])
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def bar(
    sheet: Image.Image,
    pen: ImageDraw.ImageDraw,
    y: int,
    top: int,
    canvas: int,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw the colour scale with its numbers."""
    left, length = MARGIN + SIDE, min(canvas - 2 * MARGIN - SIDE - 30, 480)
    colours = heat(np.linspace(0, top, length), top)[None].repeat(14, 0)
    sheet.paste(Image.fromarray(colours), (left, y))
    for part in range(5):
        x, value = left + part * (length - 1) // 4, top * part / 4
        pen.line((x, y + 14, x, y + 19), FAINT)
        text = f"{value:g}" + (" and more" if part == 4 and top < 255 else "")
        pen.text((x - (0 if part == 0 else pen.textlength(f"{value:g}", font) / 2), y + 21), text, INK, font)
    pen.text((left, y + 40), "absolute error of a pixel, mean of R, G and B, in levels of 255", FAINT, font)


def resized(picture: np.ndarray, width: int, height: int) -> Image.Image:
    """Return a picture of another size: enlarged by repeating pixels, which hides nothing, or made smaller."""
    larger = height > picture.shape[0]
    method = Image.Resampling.NEAREST if larger else Image.Resampling.BOX
    return Image.fromarray(picture).resize((width, height), method)


def beside(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Iterator[np.ndarray]:
    """Yield each original beside its reconstruction, uint8 `[H, W, 3]`, under a line that names them."""
    banner: np.ndarray | None = None
    for original, rebuilt in pairs:
        times = -(-VIDEO_TALL // original.shape[0])
        left, right = (frame.repeat(times, 0).repeat(times, 1) for frame in (original, rebuilt))
        between = np.full((left.shape[0], 8, 3), Image.new("RGB", (1, 1), PAPER).getpixel((0, 0)), np.uint8)
        frame = np.concatenate([left, between, right], 1)
        if banner is None:
            banner = named(frame.shape[1], left.shape[1] + 8)
        yield np.concatenate([banner, frame])


def named(width: int, second: int) -> np.ndarray:
    """Return the line above a video: what is seen left, and right from `second` on."""
    line = Image.new("RGB", (width, 28), PAPER)
    pen, font = ImageDraw.Draw(line), ImageFont.load_default(15)
    for place, name in ((8, "original"), (second + 8, "reconstruction")):
        pen.text((place, 5), fit(pen, name, font, second - 16), INK, font)
    return np.asarray(line)
