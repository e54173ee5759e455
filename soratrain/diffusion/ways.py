"""The ways to sample, as layouts: which stretches of a sample are given, where they stand, and what is drawn. Pure.

Every layout has one stretch that is drawn and any number that are given; the net sees them as segments of one sample
(segments.py). Frames count pixels' frames at the sample's rate. Latent i of a stretch stands 4 i frames after its
first; of a clip encoded standalone, latent 0 shows one frame and every later one the four that end where it stands.

A suffix is always encoded standalone, since a slice of causal latents knows what came before it. So it begins at the
last frame that the drawn part shows, and that one frame is in both.

Legend: C channels, t h w latent size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from soratrain.diffusion.segments import Segment
from soratrain.models.patchify import STRIDE, Patch

TIME = STRIDE[0]


@dataclass(frozen=True)
class Given:
    """A clean stretch.

    Attributes:
        latent: `[C, t, h, w]`.
        frame: where its first latent stands.
        standalone: whether that was encoded with nothing before it.
    """

    latent: Tensor
    frame: int
    standalone: bool = True


@dataclass(frozen=True)
class Layout:
    """What is given of a sample, and what is drawn.

    Attributes:
        shape: of the drawn stretch `(C, t, h, w)`.
        fps: frames per second.
        frame: where its first latent stands.
        standalone: whether that has nothing before it, as a clip's first has.
        before, after: what is given, in order of time.
        base: `[C, t, h, w]` of the drawn stretch: what is known of it, and what it starts from where it is noised in
            part; None where it starts from noise.
        known: which positions of `base` are given, bool `[t, h, w]`, whole patches; None: none.
    """

    shape: tuple[int, int, int, int]
    fps: float
    frame: int = 0
    standalone: bool = True
    before: tuple[Given, ...] = ()
    after: tuple[Given, ...] = ()
    base: Tensor | None = None
    known: Tensor | None = None

    @property
    def given(self) -> tuple[Given, ...]:
        """All that is given."""
        return (*self.before, *self.after)

    @property
    def positions(self) -> int:
        """Latent positions in all, given and drawn."""
        steps = self.shape[1] + sum(given.latent.shape[1] for given in self.given)
        return steps * self.shape[2] * self.shape[3]

    @property
    def duration(self) -> int:
        """Latent frames of the clip that it shows, those that two stretches show counted once, as training counts."""
        parts = [(self.frame, self.shape[1]), *((given.frame, given.latent.shape[1]) for given in self.given)]
        last = max(frame + TIME * (steps - 1) for frame, steps in parts)
        return 1 + (last - min(frame for frame, _ in parts)) // TIME

    def to(self, device: torch.device | str) -> Layout:
        """Return the same on a device."""

        def moved(parts: tuple[Given, ...]) -> tuple[Given, ...]:
            return tuple(replace(part, latent=part.latent.to(device)) for part in parts)

        base = None if self.base is None else self.base.to(device)
        known = None if self.known is None else self.known.to(device)
        return replace(self, before=moved(self.before), after=moved(self.after), base=base, known=known)

    def segments(self, drawn: Tensor, sigma: float, patch: Patch, rope_time: str) -> list[Segment]:
        """Return the sample as the net sees it while `drawn` `[C, t, h, w]` is at the noise level `sigma`."""

        def origin(frame: int) -> tuple[float, float, float]:
            return (frame / self.fps if rope_time == "seconds" else frame / TIME, 0.0, 0.0)

        def clean(given: Given) -> Segment:
            where = {"origin": origin(given.frame), "standalone": given.standalone}
            return Segment(given.latent, torch.tensor(0.0), self.fps, known=True, **where)  # type: ignore[arg-type]

        known: Tensor | bool = False
        level = torch.tensor(sigma)
        if self.known is not None:
            known = self.known[:: patch[0], :: patch[1], :: patch[2]].flatten().cpu()
            level = torch.where(known, 0.0, level)
        where = {"origin": origin(self.frame), "standalone": self.standalone}
        middle = Segment(drawn, level, self.fps, known=known, **where)  # type: ignore[arg-type]
        return [*map(clean, self.before), middle, *map(clean, self.after)]


def following(prefix: Tensor, steps: int, fps: float, *, standalone: bool) -> Layout:
    """Return `steps` latents drawn after a prefix `[C, p, h, w]`.

    Args:
        standalone: whether the prefix begins where its clip does; else it is a slice out of the middle.
    """
    channels, count, height, width = prefix.shape
    return Layout(
        (channels, steps, height, width),
        fps,
        frame=TIME * count,
        standalone=False,
        before=(Given(prefix, 0, standalone),),
    )


def leading(suffix: Tensor, steps: int, fps: float) -> Layout:
    """Return a beginning drawn before a suffix: `steps + 1` latents, the last of which shows the suffix's first frame.

    So 4 `steps` frames are new. `suffix` `[C, m, h, w]` is encoded standalone.
    """
    channels, _, height, width = suffix.shape
    return Layout((channels, steps + 1, height, width), fps, after=(Given(suffix, TIME * steps),))


def bridging(prefix: Tensor, steps: int, suffix: Tensor, fps: float, *, standalone: bool) -> Layout:
    """Return `steps` latents drawn between a prefix and a suffix, the last of which shows the suffix's first frame.

    So 4 `steps` - 1 frames are new. `standalone` is the prefix's; see `following` and `leading`.
    """
    layout = following(prefix, steps, fps, standalone=standalone)
    return replace(layout, after=(Given(suffix, layout.frame + TIME * (steps - 1)),))


def within(base: Tensor, known: Tensor, fps: float) -> Layout:
    """Return a clip `base` `[C, t, h, w]` of which all but the `known` positions are drawn."""
    return Layout(tuple(base.shape), fps, base=base, known=known)  # type: ignore[arg-type]


def over(base: Tensor, fps: float, pictures: Sequence[Tensor] = (), every: int = 1) -> Layout:
    """Return a clip drawn anew from `base` noised in part; of every `every`-th frame the picture may be given.

    Args:
        pictures: each `[C, 1, h, w]`, one frame encoded standalone.
    """
    given = tuple(Given(picture, every * number) for number, picture in enumerate(pictures))
    return Layout(tuple(base.shape), fps, before=given, base=base)  # type: ignore[arg-type]


def known_positions(redrawn: Tensor, stride: Sequence[int], patch: Patch, margin: int = 0) -> Tensor:
    """Return which latent positions show nothing that is to be drawn anew, bool `[t, h, w]`, by whole patches.

    Args:
        redrawn: pixels that are drawn anew, bool `[1 + 4k, H, W]`.
        stride: of the VAE in time, height and width.
        patch: of the net.
        margin: patches around them that are drawn anew as well, in space and time.
    """
    time, high, wide = stride
    first = redrawn[:1].expand(time - 1, -1, -1)  # latent 0 shows one frame, the others `time`
    pixels = torch.cat((first, redrawn)).float()[None]
    cell = (time * patch[0], high * patch[1], wide * patch[2])
    cells = F.max_pool3d(pixels, cell, cell)
    if margin:
        cells = F.max_pool3d(cells, 2 * margin + 1, 1, margin)
    known = cells[0] == 0
    for axis, count in enumerate(patch):
        known = known.repeat_interleave(count, axis)
    return known
