"""A contact sheet: one row a clip, its text above, frames evenly spaced in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK, FAINT, GOOD, BAD = "#14161a", "#eceff4", "#8b93a1", "#7bd88f", "#ff7a85"
GIVEN, BORDER = "#f5b83d", 4  # of frames that were given, and how many pixels wide
MARGIN, GAP, LINE = 28, 6, 22


@dataclass(frozen=True)
class Row:
    """One clip of the sheet.

    Attributes:
        text: what was asked for.
        frames: uint8 `[T, H, W, 3]`.
        notes: short remarks, each with whether it is good, bad or (None) neither.
        given: which frames were given, bool `[T]`; these have a border. None: none.
    """

    text: str
    frames: np.ndarray
    notes: Sequence[tuple[str, bool | None]] = ()
    given: np.ndarray | None = None


def pick(frames: np.ndarray, count: int) -> np.ndarray:
    """Return at most `count` frames, evenly spaced, the first and the last among them."""
    positions = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    return frames[positions]


def strip(frames: np.ndarray, count: int = 6, height: int = 128, given: np.ndarray | None = None) -> Image.Image:
    """Return evenly spaced frames side by side, scaled to `height` pixels, those that were `given` with a border."""
    chosen = pick(frames, count)
    marked = np.zeros(len(chosen), bool) if given is None else pick(given, count)
    width = max(1, round(chosen.shape[2] * height / chosen.shape[1]))
    image = Image.new("RGB", (len(chosen) * (width + GAP) - GAP, height), PAPER)
    draw = ImageDraw.Draw(image)
    for index, frame in enumerate(chosen):
        left = index * (width + GAP)
        image.paste(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC), (left, 0))
        if marked[index]:
            draw.rectangle((left, 0, left + width - 1, height - 1), outline=GIVEN, width=BORDER)
    return image


def contact_sheet(path: Path, title: str, sections: Sequence[tuple[str, Sequence[Row]]], columns: int = 2) -> None:
    """Draw the sheet to a PNG: sections under each other, rows of a section in `columns`."""
    fonts = {size: ImageFont.load_default(size) for size in (30, 20, 15)}
    strips = [[strip(row.frames, given=row.given) for row in rows] for _, rows in sections]
    cell_width = max(image.width for images in strips for image in images)
    cell_height = strips[0][0].height + 2 * LINE + 22
    width = 2 * MARGIN + columns * cell_width + (columns - 1) * MARGIN
    lines = [-(-len(rows) // columns) for _, rows in sections]
    height = 2 * MARGIN + 44 + sum(54 + count * cell_height for count in lines)
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((MARGIN, MARGIN - 6), title, INK, fonts[30])
    top = MARGIN + 44
    for (heading, rows), images, count in zip(sections, strips, lines, strict=True):
        draw.text((MARGIN, top + 10), heading, FAINT, fonts[20])
        top += 54
        for index, (row, image) in enumerate(zip(rows, images, strict=True)):
            left = MARGIN + (index % columns) * (cell_width + MARGIN)
            y = top + (index // columns) * cell_height
            draw.text((left, y), fit(draw, row.text, fonts[15], cell_width), INK, fonts[15])
            x = float(left)
            for note, good in row.notes:
                draw.text((x, y + LINE), note, FAINT if good is None else GOOD if good else BAD, fonts[15])
                x += draw.textlength(note + "   ", fonts[15])
            sheet.paste(image, (left, y + 2 * LINE))
        top += count * cell_height
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def fit(draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Return `text`, cut with an ellipsis where it is wider than `width` pixels."""
    if draw.textlength(text, font) <= width:
        return text
    while text and draw.textlength(text + "…", font) > width:
        text = text[:-1]
    return text + "…"
