"""A picture of a validation's table: noise levels down, sizes and durations across, one block for each weights."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from soratrain.callbacks.validation_table import Table
from soratrain.compared import heat
from soratrain.data.atomic import replacing
from soratrain.sheet import FAINT, GAP, INK, MARGIN, PAPER

CELL, TALL, HEAD, SIDE, BETWEEN = 70, 30, 56, 84, 34  # pixels: cell, column's head, row's names, between blocks
MOST = 12  # columns of a block; of more sizes those with most clips are shown, the rest as their mean
DARK = "#14161a"
TITLES = {"ema": "averaged weights", "raw": "trained weights"}


def draw(path: Path, title: str, table: Table) -> None:
    """Draw the table to a PNG; all blocks have one colour scale, which the line below names."""
    columns = chosen(table)
    blocks = {name: gathered(table, name, columns) for name in table.losses}
    every = torch.cat([values.flatten() for values in blocks.values()])
    low, high = float(every.min()), float(every.max())
    fonts = {size: ImageFont.load_default(size) for size in (24, 15, 13)}
    levels, wide = table.levels.shape[1], (len(columns) + 1) * CELL + GAP
    width = max(2 * MARGIN + SIDE + len(blocks) * wide + (len(blocks) - 1) * BETWEEN, 720)
    top = MARGIN + 44 + 30 + HEAD
    image = Image.new("RGB", (width, top + (levels + 1) * TALL + GAP + 58 + MARGIN), PAPER)
    pen = ImageDraw.Draw(image)
    pen.text((MARGIN, MARGIN - 6), title, INK, fonts[24])
    rows = [levels - 1 - row for row in range(levels)]  # most noise above, as sampling goes
    shared = table.shared_levels
    pen.text((MARGIN, top - 24), "noise level", FAINT, fonts[13])
    for row, level in enumerate(rows):
        name = f"{shared[level]:.3f}" if shared else f"{(level + 0.5) / levels:.0%} of them"
        pen.text((MARGIN, top + row * TALL + 7), name, INK, fonts[15])
    pen.text((MARGIN, top + levels * TALL + GAP + 7), "mean", INK, fonts[15])
    for block, (weights, values) in enumerate(blocks.items()):
        left = MARGIN + SIDE + block * (wide + BETWEEN)
        pen.text((left, MARGIN + 42), TITLES.get(weights, weights), INK, fonts[15])
        for place, names in enumerate([*(heading(table, column) for column in columns), ("all", "", "")]):
            x = left + place * CELL + (GAP if place == len(columns) else 0)
            for line, name in enumerate(names):
                pen.text((x + CELL / 2, top - HEAD + 16 * line), name, FAINT if line else INK, fonts[13], anchor="ma")
            for row in range(levels + 1):
                value = float(values[place, rows[row]] if row < levels else values[place].mean())
                y = top + row * TALL + (GAP if row == levels else 0)
                part = (value - low) / ((high - low) or 1.0)
                colour = tuple(heat(torch.tensor(part).numpy(), 1.0).tolist())
                pen.rectangle((x, y, x + CELL - 2, y + TALL - 2), fill=colour)
                ink = DARK if sum(colour) > 380 else INK
                pen.text((x + CELL / 2 - 1, y + TALL / 2 - 1), number(value), ink, fonts[13], anchor="mm")
    scale(image, pen, (MARGIN + SIDE, top + (levels + 1) * TALL + GAP + 26), low, high, fonts[13])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        image.save(temporary, format="PNG")


def chosen(table: Table) -> list[list[int]]:
    """Return which of the table's sizes each column stands for."""
    places = list(range(len(table.sizes)))
    if len(places) <= MOST:
        return [[place] for place in places]
    frequent = sorted(sorted(places, key=lambda place: -table.clips[place])[: MOST - 1])
    return [*([place] for place in frequent), [place for place in places if place not in frequent]]


def gathered(table: Table, name: str, columns: list[list[int]]) -> torch.Tensor:
    """Return the columns' values and, last, those of all clips, `[columns + 1, levels]`."""
    clips = torch.tensor(table.clips, dtype=torch.float64)[:, None]
    values = [(table.losses[name] * clips)[column].sum(0) / clips[column].sum() for column in columns]
    return torch.stack([*values, table.at_levels(name)])


def heading(table: Table, column: list[int]) -> tuple[str, str, str]:
    """Return size, duration and number of clips of a column."""
    count = sum(table.clips[place] for place in column)
    if len(column) > 1:
        return f"{len(column)} others", "", f"{count} clips"
    size = table.sizes[column[0]]
    duration = "image" if size.frames == 1 else f"{size.frames} frames"
    return f"{size.width}x{size.height}", duration, f"{count} clip{'s' * (count != 1)}"


def number(value: float) -> str:
    """Return a loss with three digits after the point, or in all where it is large."""
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def scale(
    image: Image.Image,
    pen: ImageDraw.ImageDraw,
    at: tuple[int, int],
    low: float,
    high: float,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    """Draw the colour scale with its ends."""
    x, y = at
    length = 240
    colours = heat(torch.linspace(0, 1, length).numpy()[None].repeat(12, 0), 1.0)
    pen.text((x, y - 2), number(low), FAINT, font)
    start = x + 52
    image.paste(Image.fromarray(colours), (start, y))
    pen.text((start + length + 10, y - 2), number(high), FAINT, font)
