"""Steps from noise to a clean latent by a net's predictions. The net is a callable.

`predict(x, sigma)` returns the raw prediction for the whole `x` at one noise level; the objective turns it into what a
step needs. Each solver carries `x` from `levels[0]` to `levels[-1]`, which is 0; where `free` is false `x` is known and
comes back bit for bit.

Legend: a, s: `x = a clean + s noise` at a level, by the objective's `coefficients`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from soratrain.diffusion.objective import Objective

Predict = Callable[[Tensor, float], Tensor]
Noise = Callable[[int], Tensor]


def euler(
    predict: Predict,
    x: Tensor,
    objective: Objective,
    levels: Sequence[float],
    free: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return `x` after straight steps along the velocity; the error falls with the number of steps."""
    for now, after in pairwise(levels):
        x = _held(x + (after - now) * _velocity(predict, x, objective, now), x, free)
    return x


def heun(
    predict: Predict,
    x: Tensor,
    objective: Objective,
    levels: Sequence[float],
    free: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return `x` after steps along the mean of the velocities at both ends, two forwards each; the error falls with
    the square of their number. The last is Euler's, since nothing is to be predicted of a clean latent (Karras et
    al., 2022, algorithm 1)."""
    for now, after in pairwise(levels):
        velocity = _velocity(predict, x, objective, now)
        moved = _held(x + (after - now) * velocity, x, free)
        if after > 0:
            velocity = (velocity + _velocity(predict, moved, objective, after)) / 2
            moved = _held(x + (after - now) * velocity, x, free)
        x = moved
    return x


def ddim(
    predict: Predict,
    x: Tensor,
    objective: Objective,
    levels: Sequence[float],
    free: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return `x` after steps that keep the predicted clean latent and noise (Song et al., 2021, eq. 12 with eta 0)."""
    for now, after in pairwise(levels):
        prediction, level = predict(x, now), _level(now, x)
        a, s = _coefficients(objective, after)
        moved = a * objective.to_clean(x, prediction, level) + s * objective.to_noise(x, prediction, level)
        x = _held(moved, x, free)
    return x


def dpmpp(
    predict: Predict,
    x: Tensor,
    objective: Objective,
    levels: Sequence[float],
    free: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return `x` after steps of DPM-Solver++(2M), which extrapolates the predicted clean latent from the last two
    (Lu et al., 2022, algorithm 2); one forward a step, and the error falls with the square of their number.

    Steps are in lambda = log(a / s). Where that is infinite, at pure noise and at the clean end, the extrapolation's
    limit is none, a step of first order; a e^-h, of algorithm 2, is written as a of now times the ratio of both s.
    """
    before: Tensor | None = None
    last = math.inf  # the step in lambda that led here
    for now, after in pairwise(levels):
        clean = objective.to_clean(x, predict(x, now), _level(now, x))
        (a, s), (a_after, s_after) = _coefficients(objective, now), _coefficients(objective, after)
        step = math.log(a_after / s_after * s / a) if a and s_after else math.inf
        target = clean
        if before is not None and math.isfinite(step) and math.isfinite(last):
            target = clean + step / (2 * last) * (clean - before)
        moved = s_after / s * x + (a_after - a * s_after / s) * target
        before, last, x = clean, step, _held(moved, x, free)
    return x


def ancestral(
    predict: Predict,
    x: Tensor,
    objective: Objective,
    levels: Sequence[float],
    free: Tensor | None = None,
    noise: Noise | None = None,
) -> Tensor:
    """Return `x` after draws from the posterior of each level given the one before (Ho et al., 2020, eqs. 6 and 7).

    `noise(step)` gives the noise of each step but the last, which adds none.
    """
    assert noise is not None, "ancestral sampling draws noise at each step"
    for step, (now, after) in enumerate(pairwise(levels)):
        clean = objective.to_clean(x, predict(x, now), _level(now, x))
        (a, s), (a_after, s_after) = _coefficients(objective, now), _coefficients(objective, after)
        kept = a / a_after  # of what is there, from the cleaner level to the noisier
        fresh = 1 - kept**2
        moved = a_after * fresh / s**2 * clean + kept * (s_after / s) ** 2 * x
        if after > 0:
            moved = moved + math.sqrt(fresh) * s_after / s * noise(step)
        x = _held(moved, x, free)
    return x


SOLVERS = {"euler": euler, "heun": heun, "ddim": ddim, "dpmpp": dpmpp, "ancestral": ancestral}


def _level(sigma: float, x: Tensor) -> Tensor:
    return torch.tensor(sigma, dtype=x.dtype)


def _velocity(predict: Predict, x: Tensor, objective: Objective, sigma: float) -> Tensor:
    return objective.to_velocity(x, predict(x, sigma), _level(sigma, x))


def _coefficients(objective: Objective, sigma: float) -> tuple[float, float]:
    a, s = objective.coefficients(torch.tensor(sigma, dtype=torch.float64))
    return float(a), float(s)


def _held(moved: Tensor, x: Tensor, free: Tensor | None) -> Tensor:
    return moved if free is None else torch.where(free, moved, x)
