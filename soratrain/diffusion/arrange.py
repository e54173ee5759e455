"""From a sample's latents to its segments and what the net should answer: where in time each segment stands.

A prefix is a slice of the causal latent: its start, which is exactly what encoding those frames alone gives, or a piece
out of its middle, which knows what came before it, as that which a rolling window sees (rolling.py). A suffix never is
one, since it would leak what comes before it: it is the clip's last frames, encoded standalone.

Of a clip of 1 + 4K frames, with latent frames 0 to K, a suffix of 1 + 4j frames begins at frame 4(K - j), and its own
latent frames 0 to j stand there and 4, 8, ... frames later. Noise are the latent frames up to K - j, the last of which
covers frames 4(K - j) - 3 to 4(K - j). So both have one frame, since the 4(K - j) before it could not be encoded alone,
and such a sample has one latent frame more than its clip.

Legend: C latent channels, t h w latent size, n tokens, P channels of a patch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from soratrain.batch import keyed_normal, keyed_uniform
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.segments import Segment
from soratrain.models.patchify import STRIDE, Patch, grid_of, patchify_target

TIME = STRIDE[0]


@dataclass(frozen=True)
class Case:
    """How one sample is shown.

    Attributes:
        mode: what of it is given; see conditioning.py.
        asked: the mode that was drawn; its clip may be too short for it, and is then shown as text to video.
        prefix: latent frames before the noise.
        skip: how many of these are cut off, less than all; the others are given.
        tail: frames given at the end, 1 + 4j, or 0 for none.
        known: the tokens that are given to paint in the others `[n]`, bool; or None.
        level: noise level of what is given.
    """

    mode: str
    asked: str
    prefix: int = 0
    skip: int = 0
    tail: int = 0
    known: Tensor | None = None
    level: float = 0.0


@dataclass(frozen=True)
class Sample:
    """What there is of one sample.

    Attributes:
        clean: its latent `[C, t, h, w]`.
        noise: of the same shape.
        sigma: its noise level, a scalar.
        fps: frames per second of its pixels.
        draw: all further randomness.
        tail: its last frames encoded standalone `[C, 1 + j, h, w]`, where they are given.
    """

    clean: Tensor
    noise: Tensor
    sigma: Tensor
    fps: float
    draw: int
    tail: Tensor | None = None


@dataclass(frozen=True)
class Arranged:
    """One sample as the net sees it, and what it should answer.

    Attributes:
        segments: in the order in which they stand in the pack.
        target: of every token `[n, P]`; of known ones it does not matter, since they are not supervised.
        weights: of each token's error `[n]`, by its own noise level; None where the sample's level decides.
    """

    segments: list[Segment]
    target: Tensor
    weights: Tensor | None = None


def arrange(sample: Sample, case: Case, objective: Objective, patch: Patch, rope_time: str) -> Arranged:
    """Return the segments of a sample that is shown as `case` says, and their targets.

    Args:
        objective: how it is noised, and what is to be predicted.
        patch: patch size.
        rope_time: how the net counts time, `seconds` or `index`.
    """
    if case.mode == "rollout":
        return _rollout(sample, objective, patch)
    clean, noise, fps, level = sample.clean, sample.noise, sample.fps, torch.tensor(case.level)

    def given(latent: Tensor, noise: Tensor) -> Tensor:
        return objective.noised(latent, noise, level) if case.level else latent

    noised, target = (make(clean, noise, sample.sigma) for make in (objective.noised, objective.target))
    if case.known is not None:
        mask = case.known.view(grid_of(clean, patch))
        for axis, size in enumerate(patch):
            mask = mask.repeat_interleave(size, dim=axis)
        latent = torch.where(mask.to(clean.device), given(clean, noise), noised)
        sigma = torch.where(case.known, level, sample.sigma.cpu())
        return Arranged([Segment(latent, sigma, fps, known=case.known)], patchify_target(target, patch))
    first, last = case.prefix, clean.shape[1] - (case.tail - 1) // TIME if case.tail else clean.shape[1]
    step = TIME / fps if rope_time == "seconds" else 1.0  # between latent frames

    def origin(frame: int) -> tuple[float, float, float]:
        return ((frame - case.skip) * step, 0.0, 0.0)

    segments = [Segment(noised[:, first:last], sample.sigma, fps, origin=origin(first), standalone=not first)]
    if first:
        there = slice(case.skip, first)
        latent = given(clean[:, there], noise[:, there])
        segments.insert(0, Segment(latent, level, fps, standalone=not case.skip, known=True))
    if case.tail:
        assert sample.tail is not None and sample.tail.shape[1] == 1 + (case.tail - 1) // TIME
        tail = given(sample.tail, keyed_normal(sample.draw, "tail noise", sample.tail.shape, clean.device))
        segments.append(Segment(tail, level, fps, origin=origin(last - 1), known=True))
    aims = [target[:, first:last] if part.known is False else torch.zeros_like(part.latent) for part in segments]
    return Arranged(segments, torch.cat([patchify_target(aim, patch) for aim in aims]))


def _rollout(sample: Sample, objective: Objective, patch: Patch) -> Arranged:
    """Return a sample of which each latent frame (of a patch in time, each patch) has a noise level of its own."""
    clean = sample.clean
    times, rows, columns = grid_of(clean, patch)
    uniform = keyed_uniform(sample.draw, "rollout", (times,))
    levels = objective.levels(uniform, torch.full((times,), times * rows * columns))
    spread = levels.repeat_interleave(patch[0]).view(1, -1, 1, 1).to(clean.device)
    noised, target = (make(clean, sample.noise, spread) for make in (objective.noised, objective.target))
    weights = objective.weight(levels).repeat_interleave(rows * columns).to(clean.device)
    segment = Segment(noised, levels.repeat_interleave(rows * columns), sample.fps)
    return Arranged([segment], patchify_target(target, patch), weights)
