"""A long clip cut up among processes: each encodes a box of its frames, rows and columns, and the boxes make the whole.

A VAE of ours has no attention: a latent position depends on a window of pixels (`Local.window`) in so many frames up to
its own. A process reads that much around its positions, encodes it as a clip of its own, and cuts off what it has
computed beyond. So processes exchange nothing but their latents, and those are the whole clip's but for rounding.

Sides are counted in latent positions; position i stands at frame `stride · i`, or at pixels `stride · i` and on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import pairwise, product

from torch import Tensor

from soratrain.data.assignment import Bucket
from soratrain.models.layers import CausalConv3d, through
from soratrain.models.vae import VAE

WORTH = Fraction(3, 4)  # of a clip that the largest part may be: beyond, one process alone takes hardly longer
LATENT = "latent"  # what `ClipEncoder` calls that of the whole clip, beside those of its ends


@dataclass(frozen=True)
class Span:
    """Positions `start` to `stop` of a side, for which `low` to `high` are computed."""

    start: int
    stop: int
    low: int
    high: int

    @property
    def own(self) -> slice:
        """Which positions of the whole side they are."""
        return slice(self.start, self.stop)

    @property
    def kept(self) -> slice:
        """Which of the computed positions they are."""
        return slice(self.start - self.low, self.stop - self.low)


@dataclass(frozen=True)
class Side:
    """One side of a clip.

    Attributes:
        count: its positions.
        before, after: positions that one depends on, on either hand.
    """

    count: int
    before: int
    after: int

    def spans(self, parts: int) -> list[Span]:
        """Return so many spans that compute about equally much; none where one would be left without a position."""
        around = self.before + self.after
        if parts == 1:
            return [Span(0, self.count, 0, self.count)]
        if self.count - around < parts:
            return []
        most = Fraction(self.count + (parts - 1) * around, parts)
        inner = [int(most - self.after + place * (most - around)) for place in range(parts - 1)]
        return [
            Span(start, stop, max(0, start - self.before), min(self.count, stop + self.after))
            for start, stop in pairwise([0, *inner, self.count])
        ]


@dataclass(frozen=True)
class Part:
    """What one process encodes of a clip.

    Attributes:
        time, height, width: its positions.
        stride: of the VAE.
        ends: whether it holds the clip's end, of which the last frames are encoded standalone too.
    """

    time: Span
    height: Span
    width: Span
    stride: tuple[int, int, int]
    ends: bool

    @property
    def pixels(self) -> tuple[slice, slice, slice]:
        """Which frames, rows and columns of the clip it reads."""
        time, high, wide = self.stride
        frames = slice(self.time.low * time, (self.time.high - 1) * time + 1)
        return (
            frames,
            slice(self.height.low * high, self.height.high * high),
            slice(self.width.low * wide, self.width.high * wide),
        )

    def of(self, latent: Tensor, name: str) -> Tensor:
        """Return its own positions of what was encoded of its pixels, `[..., t, h, w]`."""
        time = self.time.kept if name == LATENT else slice(None)
        return latent[..., time, self.height.kept, self.width.kept]


def divide(vae: VAE, bucket: Bucket, ranks: int, tails: Sequence[int]) -> list[Part]:
    """Return into which parts a clip is cut for `ranks` processes: those whose largest is least, `ranks` at most.

    Args:
        tails: numbers of last frames that are encoded standalone.

    Returns:
        None at all where the largest would be more than `WORTH` of the clip.
    """
    sides = sides_of(vae, bucket)
    best: tuple[int, tuple[list[Span], ...]] | None = None
    for counts in product(range(1, ranks + 1), repeat=3):
        if counts[0] * counts[1] * counts[2] > ranks:
            continue
        spans = tuple(side.spans(count) for side, count in zip(sides, counts, strict=True))
        if not all(spans):
            continue
        size = 1
        for each in spans:
            size *= max(span.high - span.low for span in each)
        if best is None or size < best[0]:
            best = size, spans
    assert best is not None, "a clip can always be left whole"
    if best[0] > WORTH * sides[0].count * sides[1].count * sides[2].count:
        return []
    times, heights, widths = best[1]
    longest = max((tail for tail in tails if tail <= bucket.frames), default=1)
    last = times[-1]
    times = [*times[:-1], replace(last, low=min(last.low, last.stop - 1 - (longest - 1) // vae.stride[0]))]
    return [
        Part(time, height, width, vae.stride, time.stop == sides[0].count)
        for time, height, width in product(times, heights, widths)
    ]


def sides_of(vae: VAE, bucket: Bucket) -> tuple[Side, Side, Side]:
    """Return a clip's sides in time, height and width."""
    time, high, wide = vae.stride
    low, top = (edge * vae.front.space for edge in through(vae.encoder, 0, 1))
    before, after = -(low // high), -((high - top) // high)
    return (
        Side(1 + (bucket.frames - 1) // time, -(-frames_before(vae) // time), 0),
        Side(bucket.height // high, before, after),
        Side(bucket.width // wide, before, after),
    )


def frames_before(vae: VAE) -> int:
    """Return how many frames before the one at which a latent stands it depends on."""
    frames = 0
    for conv in reversed([module for module in vae.encoder.modules() if isinstance(module, CausalConv3d)]):
        frames = frames * conv.conv.stride[0] + conv.lead
    return (frames + 1) * vae.front.time - 1


def joined(parts: Sequence[Part], found: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the latents `[C, t, h, w]` of a whole clip from those of its parts."""
    steps, high, wide = (max(span.stop for span in side) for side in zip(*map(spans_of, parts), strict=True))
    whole: dict[str, Tensor] = {}
    for part, tensors in zip(parts, found, strict=True):
        for name, piece in tensors.items():
            if name not in whole:
                whole[name] = piece.new_empty(len(piece), steps if name == LATENT else piece.shape[1], high, wide)
            time = part.time.own if name == LATENT else slice(None)
            whole[name][:, time, part.height.own, part.width.own] = piece
    return whole


def spans_of(part: Part) -> tuple[Span, Span, Span]:
    """Return a part's spans in time, height and width."""
    return part.time, part.height, part.width
