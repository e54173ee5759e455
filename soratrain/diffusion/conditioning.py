"""Which parts of a clip are given in training: a mode for each sample, which its draw chooses out of a mix.

    t2v       nothing: all of it is noise
    prefix    its first latent frames, one of them (what animating an image is) or more
    suffix    its last frames
    connect   both
    inpaint   some tokens: masks.py says which
    rollout   nothing, but each latent frame has a noise level of its own (diffusion forcing: Chen et al., 2024)

What a mode makes of a clip's latents stands in arrange.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from soratrain.batch import keyed_uniform
from soratrain.diffusion.arrange import TIME, Case
from soratrain.diffusion.masks import NUMBERS, known_tokens
from soratrain.errors import ConfigError
from soratrain.models.patchify import Patch

MODES = ("prefix", "suffix", "connect", "inpaint", "rollout")  # beside t2v, in the order in which they are drawn
ENDS = ("suffix", "connect")  # modes that need a tail


@dataclass(frozen=True, kw_only=True)
class Conditioning:
    """The mix of modes.

    Attributes:
        mix: share of the samples that each of `MODES` has; what is left is text to video.
        animate: of prefixes, also those of `connect`, the share that are one latent frame: an image.
        rolled: of the longer ones, the share of which the first latent frames are cut off, as rolling windows see them.
        tail_frames: frames, each 1 + 4j, of the ends that are given, as stage=encode has stored them.
        ramp: share of the run over which the mix grows, linearly, from text to video alone to `mix`.
        known_noise: largest noise level of what is given; each sample draws its own up to it, and 0 leaves it clean.
            It is marked as known all the same, and the net is told the level.
        caption_dropout: share of captions replaced by the empty prompt, which guidance needs.

    Raises:
        ConfigError: a value out of range, or values that do not go together.
    """

    mix: Mapping[str, float] = field(default_factory=dict)
    animate: float = 0.5
    rolled: float = 0.0
    tail_frames: Sequence[int] = ()
    ramp: float = 0.0
    known_noise: float = 0.0
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        for name in ("animate", "rolled", "ramp", "known_noise", "caption_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"conditioning.{name}={getattr(self, name)} must lie in [0, 1]")
        if not isinstance(self.mix, Mapping) or not isinstance(self.tail_frames, list | tuple):
            raise ConfigError(
                f"conditioning.mix={self.mix!r} must hold a share by mode, {{prefix: 0.2}} say, and"
                f" conditioning.tail_frames={self.tail_frames!r} numbers of frames, [1, 5] say"
            )
        for name, share in self.mix.items():
            if name not in MODES:
                raise ConfigError(
                    f"conditioning.mix.{name}={share}: no such mode; known: {', '.join(MODES)} (t2v is what they leave)"
                )
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise ConfigError(f"conditioning.mix.{name}={share!r} must be a share, a number in [0, 1]")
        if (total := math.fsum(self.mix.values())) > 1 + 1e-6:
            shares = ", ".join(f"{name} {share:g}" for name, share in self.mix.items() if share)
            raise ConfigError(
                f"conditioning.mix: the shares ({shares}) sum to {total:g}; they must not exceed 1, and what they leave"
                " is text to video"
            )
        for frames in self.tail_frames:
            if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or frames % TIME != 1:
                raise ConfigError(
                    f"conditioning.tail_frames={list(self.tail_frames)}: {frames!r} is not 1 + {TIME}k; use 1, 5 or 9"
                )
        if self.ends and not self.tail_frames:
            raise ConfigError(
                f"conditioning.mix.{self.ends[0]}={self.mix[self.ends[0]]} needs ends to give: set"
                " conditioning.tail_frames to some of what stage=encode stores (its stage.job.tail_frames), [1, 5] say"
            )

    @property
    def mixed(self) -> bool:
        """Whether any sample may be shown otherwise than as text to video."""
        return any(self.mix.values())

    @property
    def ends(self) -> list[str]:
        """The modes of the mix that need a tail."""
        return [name for name in ENDS if self.mix.get(name)]

    def twice(self, frames: int) -> float:
        """Return the share of clips of so many latent frames that are shown with one more, as an end has one twice."""
        fits = any(frames - (tail - 1) // TIME > 1 for tail in self.tail_frames)
        return math.fsum(self.mix.get(name, 0.0) for name in ENDS) if fits else 0.0

    def check_patch(self, patch: Patch) -> None:
        """Refuse ends where a token spans several latent frames.

        Raises:
            ConfigError: says so.
        """
        if self.ends and patch[0] > 1:
            raise ConfigError(
                f"dit.patch={list(patch)}: a clip's end shares one frame with the noise before it, so that both cannot"
                f" be whole tokens of {patch[0]} latent frames; set conditioning.mix.suffix=0 and .connect=0, or take"
                f" dit.patch=[1,{patch[1]},{patch[2]}]"
            )

    def draw_mode(self, draw: int, done: float) -> str:
        """Return the mode of a sample when a share `done` of the run lies behind it."""
        grown = min(1.0, done / self.ramp) if self.ramp else 1.0
        place = float(keyed_uniform(draw, "mode"))
        for name in MODES:
            share = self.mix.get(name, 0.0) * grown
            if place < share:
                return name
            place -= share
        return "t2v"

    def case(self, draw: int, grid: tuple[int, int, int], patch: Patch, tails: Collection[int], done: float) -> Case:
        """Return how a sample is shown: as text to video where its clip is too short, or has no tail, for its mode.

        Args:
            draw: the sample's.
            grid: its tokens along t, y and x.
            patch: patch size; a prefix is a whole number of patches.
            tails: frames of each tail that there is of it.
            done: share of the run that lies behind.
        """
        if not self.mixed:
            return Case("t2v", "t2v")
        mode, step = self.draw_mode(draw, done), patch[0]
        frames = grid[0] * step
        level = float(keyed_uniform(draw, "known noise")) * self.known_noise
        if mode == "rollout" and grid[0] > 1:
            return Case(mode, mode)
        if mode == "prefix" and frames > step:
            prefix = self._prefix(draw, range(step, frames, step))
            return Case(mode, mode, prefix=prefix, skip=self._skip(draw, prefix, step), level=level)
        if mode == "inpaint":
            known = known_tokens(keyed_uniform(draw, "inpaint", (NUMBERS,)), grid)
            if known is not None:
                return Case(mode, mode, known=known, level=level)
        if mode in ENDS:
            before = {tail: frames - (tail - 1) // TIME for tail in sorted(set(tails) & set(self.tail_frames))}
            fitting = [tail for tail, count in before.items() if count > 1]  # frame 0 alone would be the tail's too
            if fitting:
                tail = fitting[_pick(draw, "tail", len(fitting))]
                prefix = self._prefix(draw, range(1, before[tail])) if mode == "connect" else 0
                return Case(mode, mode, prefix=prefix, skip=self._skip(draw, prefix, step), tail=tail, level=level)
        return Case("t2v", mode)

    def _prefix(self, draw: int, lengths: range) -> int:
        """Return one of the possible numbers of latent frames given at the start."""
        short = float(keyed_uniform(draw, "animate")) < self.animate
        return lengths[0] if short else lengths[_pick(draw, "prefix", len(lengths))]

    def _skip(self, draw: int, prefix: int, step: int) -> int:
        """Return how many of a prefix's latent frames are cut off."""
        choices = range(step, prefix, step)
        rolled = float(keyed_uniform(draw, "rolled")) < self.rolled
        return choices[_pick(draw, "skip", len(choices))] if rolled and choices else 0


def _pick(draw: int, stream: str, count: int) -> int:
    return int(float(keyed_uniform(draw, stream)) * count)
