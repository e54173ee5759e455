"""Exact tiling in space: a picture of any size, a tile at a time, with the same numbers as the whole.

A tile reads as far over its edges as its outputs depend on, which the layers themselves say (`window`), and what it
computes beyond is cut off. So the zeros beside the picture are seen at its true border only, and no two tiles are ever
blended. Each tile has its own state in time.

What a tile reads over its edges is computed twice. Through a whole encoder that is 45 pixels on each side, so a chain
is cut into its levels, and each is tiled alone: then only the finest, whose reach is short, needs small tiles.

Legend: positions are those of the picture at some level; a segment maps `size` of them to `size · scale`.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import Tensor

from soratrain.errors import ConfigError
from soratrain.models.layers import CausalConv3d, Chain, Local, State, through

LEAST = 1 << 18  # pixels of a step: smaller tiles are mostly what they must see around them


@dataclass(frozen=True)
class Cut:
    """One side of a tile: it reads inputs `low` to `high`, and of its outputs `skip` come before `start` to `stop`."""

    low: int
    high: int
    start: int
    stop: int
    skip: int


class Segment:
    """Layers that are run tile by tile on pictures of one size.

    Args:
        layers: a chain.
        scale, volume: of its input, positions per pixel in height and width, and in time too.
    """

    def __init__(self, layers: Chain, scale: Fraction, volume: Fraction) -> None:
        self.layers, self.before = layers, scale
        self.scale, self.volume = Fraction(1), volume
        self.density, self.work = Fraction(0), Fraction(0)  # most values at once, and multiplications, per pixel
        for layer in layers:
            assert isinstance(layer, Local)
            for conv in (module for module in layer.modules() if isinstance(module, CausalConv3d)):
                after = self.volume * conv.volume
                out_channels, in_channels = conv.conv.weight.shape[:2]
                self.density = max(self.density, in_channels * self.volume, out_channels * after)
                self.work += conv.conv.weight.numel() * after
            self.scale, self.volume = self.scale * layer.scale, self.volume * layer.volume
        self.unit = max(1, int(self.scale))  # outputs that always come together
        self.step = int(self.unit / self.scale)  # the inputs that they stand for
        low, high = self._reads(0, self.unit)
        self.halo = high - low - self.step  # inputs read on both sides
        self.cuts: tuple[list[Cut], list[Cut]] = ([], [])

    def _reads(self, start: int, stop: int) -> tuple[int, int]:
        """Return the inputs on which outputs depend, whole steps, as if the picture had no border."""
        low, high = through(self.layers, start, stop)
        return low // self.step * self.step, -(-high // self.step) * self.step

    def split(self, height: int, width: int, limit: Fraction) -> bool:
        """Cut pictures of this size into the tiles that cost least, none reading more than `limit` inputs.

        Returns:
            False where even the least tile reads more.
        """
        sizes = (height, width)
        units = [size // self.step for size in sizes]
        best: tuple[int, int, int] | None = None
        for rows in range(1, units[0] + 1):
            high = self.reading(height, -(-units[0] // rows))
            fits = units[1] if high * width <= limit else int((limit / high - self.halo) // self.step)
            if fits >= 1:
                columns = -(-units[1] // fits)
                wide = self.reading(width, -(-units[1] // columns))
                choice = (rows * high * columns * wide, rows, columns)
                best = min(best or choice, choice)
        if best is None:
            return False
        self.cuts = (self._side(height, best[1]), self._side(width, best[2]))
        return True

    def reading(self, size: int, units: int) -> int:
        """Return how many inputs a tile of so many units reads along a side of `size`."""
        return min(size, units * self.step + self.halo)

    def _side(self, size: int, parts: int) -> list[Cut]:
        found, units = [], size // self.step
        for part in range(parts):
            start, stop = (units * number // parts * self.unit for number in (part, part + 1))
            low, high = self._reads(start, stop)
            low, high = max(low, 0), min(high, size)
            found.append(Cut(low, high, start, stop, start - int(low * self.scale)))
        return found

    def overhead(self) -> float:
        """Return what all tiles read over what the picture holds."""
        read = [sum(cut.high - cut.low for cut in side) for side in self.cuts]
        size = [side[-1].high for side in self.cuts]
        return read[0] * read[1] / (size[0] * size[1])

    def __call__(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return the output of the whole picture and the tiles' states."""
        rows, columns = self.cuts
        if len(rows) == len(columns) == 1:
            return self.layers(x, state)
        tiles = [(row, column) for row in rows for column in columns]
        states, whole = [], None
        for (row, column), before in zip(tiles, state or [None] * len(tiles), strict=True):
            y, after = self.layers(x[..., row.low : row.high, column.low : column.high], before)
            if whole is None:
                whole = y.new_empty((*y.shape[:3], rows[-1].stop, columns[-1].stop))
            high, wide = row.stop - row.start, column.stop - column.start
            kept = y[..., row.skip : row.skip + high, column.skip : column.skip + wide]
            whole[..., row.start : row.stop, column.start : column.stop] = kept
            states.append(after)
        assert whole is not None
        return whole, states


class Tiles:
    """A chain whose levels are run in tiles small enough for a budget: called like the chain, it gives the same.

    Args:
        chain: of an encoder or a decoder.
        scale, volume: of its input, positions per pixel in height and width, and in time too.
        height, width: of its input.
        frames: of the clips' pixels, of all samples, in one step.
        pixels: most pixels to work on at once (frames x height x width) at the chain's widest level, halo included; a
            level that holds fewer values for each pixel takes more of them.

    Raises:
        ConfigError: not even one latent position with its halo fits the budget.
    """

    def __init__(
        self, chain: Chain, *, scale: Fraction, volume: Fraction, height: int, width: int, frames: int, pixels: int
    ) -> None:
        self.segments: list[Segment] = []
        for layers in chain.segments():
            self.segments.append(Segment(layers, scale, volume))
            scale, volume = scale * self.segments[-1].scale, self.segments[-1].volume
        densest = max(segment.density for segment in self.segments)
        least = Fraction(0)
        for segment in self.segments:
            cost = frames * segment.density / densest / segment.before**2  # of one input, in pixels
            if not segment.split(height, width, pixels / cost):
                least = max(least, cost * segment.reading(height, 1) * segment.reading(width, 1))
            height, width = int(height * segment.scale), int(width * segment.scale)
        if least:
            raise ConfigError(
                f"pixels_per_step={pixels} is less than the smallest tile takes with what it must see around it; use"
                f" {-int(-least // 1)} or more"
            )

    def overhead(self) -> float:
        """Return the multiplications in all tiles over those in the whole picture."""
        whole = sum(segment.work for segment in self.segments)
        return float(sum(segment.work * Fraction(segment.overhead()) for segment in self.segments) / whole)

    def __call__(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return the chain's output for a chunk, and the state that the next one needs."""
        states = []
        for segment, before in zip(self.segments, state or [None] * len(self.segments), strict=True):
            x, after = segment(x, before)
            states.append(after)
        return x, states
