"""Charts, drawn with Pillow: axes with readable ticks, lines and points, on a dark ground."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from soratrain.sheet import FAINT, INK, PAPER

GRID, PANEL = "#2a2e37", "#1a1d23"
SMOOTH = 3  # times as large as it is shown while it is drawn, which smooths what is slanted
RAMP = np.array([[94, 129, 244], [64, 180, 200], [123, 216, 143], [245, 184, 61], [255, 122, 133]], float)
LEFT, BOTTOM, HEAD = 70, 44, 40  # pixels of a panel kept for the values, for the steps, for its title


def shade(part: float) -> str:
    """Return a colour of the ramp: 0 its cold end, 1 its warm one."""
    place = min(max(part, 0.0), 1.0) * (len(RAMP) - 1)
    low = min(int(place), len(RAMP) - 2)
    red, green, blue = (RAMP[low] + (RAMP[low + 1] - RAMP[low]) * (place - low)).round().astype(int)
    return f"#{red:02x}{green:02x}{blue:02x}"


def is_wide(values: Sequence[float]) -> bool:
    """Return whether positive values span so much that only a logarithm shows them all."""
    return bool(values) and min(values) > 0 and max(values) / min(values) >= 8


def short(value: float) -> str:
    """Return a number in few characters."""
    if value == 0 or 1e-2 <= abs(value) < 1e5:
        return f"{value:.4g}"
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


@dataclass
class Scale:
    """Values along one side of a chart.

    Attributes:
        low, high: its ends.
        log: whether equal ratios are equally far apart.
    """

    low: float
    high: float
    log: bool = False

    @classmethod
    def around(cls, values: Sequence[float], *, log: bool | None = None, margin: float = 0.06) -> Scale:
        """Return a scale on which all finite values lie, with a margin."""
        finite = [value for value in values if math.isfinite(value)] or [0.0, 1.0]
        log = is_wide(finite) if log is None else log
        low, high = (math.log10(min(finite)), math.log10(max(finite))) if log else (min(finite), max(finite))
        room = (high - low) * margin or (0.1 if log else abs(high) * 0.1 or 1.0)
        low, high = low - room, high + room
        return cls(10**low, 10**high, True) if log else cls(low, high)

    def place(self, value: float) -> float:
        """Return where a value lies, 0 at the low end and 1 at the high one."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def ticks(self, most: int = 6) -> list[float]:
        """Return round values to mark."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 2, 3, 5), (1, 3), (1,)):
                found = [d * 10.0**e for e in decades for d in digits if self.low <= d * 10.0**e <= self.high]
                if len(found) <= most:
                    break
            if len(found) >= 2:
                return found
        span = self.high - self.low
        size = 10 ** math.floor(math.log10(span / most))
        step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if span / (size * factor) <= most)
        first = math.ceil(self.low / step) * step
        return [round(first + count * step, 12) for count in range(int((self.high - first) / step + 1e-9) + 1)]


class Chart:
    """A picture that charts are drawn on; positions and sizes are pixels as shown."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width * SMOOTH, height * SMOOTH), PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def finished(self) -> Image.Image:
        """Return the picture, at twice its size for dense screens."""
        width, height = self.image.size
        return self.image.resize((width * 2 // SMOOTH, height * 2 // SMOOTH), Image.Resampling.LANCZOS)

    def text(self, at: tuple[float, float], words: str, size: int = 14, colour: str = INK, anchor: str = "la") -> None:
        font = ImageFont.load_default(size * SMOOTH)
        self.pen.text((at[0] * SMOOTH, at[1] * SMOOTH), words, colour, font, anchor=anchor)

    def length(self, words: str, size: int = 14) -> float:
        return self.pen.textlength(words, ImageFont.load_default(size * SMOOTH)) / SMOOTH

    def box(self, area: tuple[float, float, float, float], colour: str, radius: int = 0) -> None:
        """Fill a rectangle `(left, top, right, bottom)`."""
        left, top, right, bottom = (value * SMOOTH for value in area)
        self.pen.rounded_rectangle((left, top, right, bottom), radius * SMOOTH, fill=colour)

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6) -> None:
        """Join points."""
        scaled = [(x * SMOOTH, y * SMOOTH) for x, y in points]
        self.pen.line(scaled, fill=colour, width=max(1, round(width * SMOOTH)), joint="curve")

    def dot(self, at: tuple[float, float], colour: str, radius: float = 4, *, ring: str | None = None) -> None:
        x, y, r = at[0] * SMOOTH, at[1] * SMOOTH, radius * SMOOTH
        self.pen.ellipse((x - r, y - r, x + r, y + r), fill=colour, outline=ring, width=round(1.5 * SMOOTH))


class Panel:
    """A chart within a picture, with a title and two scales.

    Args:
        area: `(left, top, right, bottom)` of all of it.
        x, y: the scales.
        below: what `x` is.
        marks: values of `x` to mark, each with its words; by default round ones.
    """

    def __init__(
        self,
        chart: Chart,
        area: tuple[float, float, float, float],
        title: str,
        x: Scale,
        y: Scale,
        *,
        below: str,
        marks: Sequence[tuple[float, str]] = (),
    ) -> None:
        self.chart, self.x, self.y = chart, x, y
        left, top, right, bottom = area
        chart.box(area, PANEL, 8)
        chart.text((left + 16, top + 12), title, 15)
        self.inside = (left + LEFT, top + HEAD + 8, right - 20, bottom - BOTTOM)
        for value, words in marks or [(tick, short(tick)) for tick in x.ticks()]:
            place, _ = self.at(value, y.low)
            chart.line([(place, self.inside[1]), (place, self.inside[3])], GRID, 1)
            chart.text((place, self.inside[3] + 6), words, 12, FAINT, "ma")
        for tick in y.ticks():
            _, height = self.at(x.low, tick)
            chart.line([(self.inside[0], height), (self.inside[2], height)], GRID, 1)
            chart.text((self.inside[0] - 8, height), short(tick), 12, FAINT, "rm")
        chart.text((self.inside[2], bottom - 8), below, 12, FAINT, "rd")

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Return the pixel of a value."""
        left, top, right, bottom = self.inside
        return left + self.x.place(x) * (right - left), bottom - self.y.place(y) * (bottom - top)

    def curve(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6) -> None:
        """Draw a line through values; one alone is a dot."""
        places = [self.at(x, y) for x, y in points if math.isfinite(y) and (y > 0 or not self.y.log)]
        if len(places) > 1:
            self.chart.line(places, colour, width)
        elif places:
            self.chart.dot(places[0], colour, 2.5)
