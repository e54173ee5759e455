"""How clips are drawn: a solver, its steps, and guidance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from soratrain.diffusion.objective import Objective
from soratrain.diffusion.solvers import SOLVERS, Noise, Predict
from soratrain.errors import ConfigError

FITTING = {"flow": ("euler", "heun", "dpmpp"), "ddpm": ("ddim", "dpmpp", "ancestral")}  # the first is what auto takes


def guided(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Return classifier-free guidance's mix; scale 1 is the conditional alone (Ho and Salimans, 2022)."""
    return unconditional + scale * (conditional - unconditional)


def check_fits(sampler: str, objective: str) -> None:
    """Refuse a sampler for an objective that it is not made for.

    Raises:
        ConfigError: names both, and what fits.
    """
    if sampler != "auto" and sampler not in FITTING[objective]:
        raise ConfigError(
            f"sampler={sampler} does not fit objective={objective}; use sampler=auto, or one of"
            f" {', '.join(FITTING[objective])}"
        )


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Draws clean latents from noise.

    Attributes:
        name: `euler`, `heun` or `dpmpp` for flow; `ddim`, `dpmpp` or `ancestral` for ddpm; `auto` takes what fits.
        steps: from noise to clean.
        guidance_scale: of classifier-free guidance; 1 is the prompt alone, at half the cost.
        guidance_rescale: share in [0, 1] of guidance's effect on the prediction's deviation that is taken back (phi of
            Lin et al., 2023, section 3.4).
        guidance_interval: guidance acts at noise levels above the first and up to the second, and costs nothing
            elsewhere (Kynkäänniemi et al., 2024). They are the levels that the net sees, 0 clean to 1 noise.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    name: str = "auto"
    steps: int = 20
    guidance_scale: float = 3.0
    guidance_rescale: float = 0.0
    guidance_interval: Sequence[float] = field(default_factory=lambda: [0.0, 1.0])

    def __post_init__(self) -> None:
        if self.name != "auto" and self.name not in SOLVERS:
            raise ConfigError(f"sampler.name={self.name!r} is unknown; use auto, {', '.join(SOLVERS)}")
        if self.steps < 1:
            raise ConfigError(f"sampler.steps={self.steps} must be at least 1")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise ConfigError(f"sampler.guidance_scale={self.guidance_scale} must be a number of at least 0")
        if not 0 <= self.guidance_rescale <= 1:
            raise ConfigError(f"sampler.guidance_rescale={self.guidance_rescale} must lie in [0, 1]")
        low, high = self.guidance_interval if len(self.guidance_interval) == 2 else (1.0, 0.0)
        if not 0 <= low < high <= 1:
            raise ConfigError(
                f"sampler.guidance_interval={list(self.guidance_interval)} must be two rising noise levels in [0, 1];"
                " sampler.guidance_scale=1 turns guidance off"
            )

    def fitted(self, objective: Objective) -> Sampler:
        """Return the sampler with `auto` settled.

        Raises:
            ConfigError: it does not fit the objective.
        """
        check_fits(self.name, objective.name)
        return replace(self, name=FITTING[objective.name][0]) if self.name == "auto" else self

    def guides(self, sigma: float) -> bool:
        """Return whether guidance acts at a noise level, so that a prediction without the prompt is needed there."""
        low, high = self.guidance_interval
        return self.guidance_scale != 1 and low < sigma <= high

    def guided(self, conditional: Tensor, unconditional: Tensor, free: Tensor | None = None) -> Tensor:
        """Return the prediction for samples `[B, ...]` where guidance acts.

        Raw predictions are mixed, which is mixing what they imply, since that is linear in them. They are rescaled as
        in Lin et al., 2023, algorithm 2: the mix times phi std(conditional) / std(mix) + 1 - phi, the deviations over
        each sample's raw prediction of what is drawn: of what is known the net has learned to predict nothing.

        Args:
            free: bool, broadcasts against the samples; what is drawn. None where it is all.
        """
        mixed = guided(conditional, unconditional, self.guidance_scale)
        if not self.guidance_rescale:
            return mixed
        ratio = _deviation(conditional, free) / _deviation(mixed, free).clamp(min=1e-12)
        return mixed * (self.guidance_rescale * ratio + 1 - self.guidance_rescale)

    def levels(self, objective: Objective, tokens: int, start: float = 1.0) -> Tensor:
        """Return the noise levels of a run on clips of so many tokens, falling to 0.

        Args:
            start: the first of them, in (0, 1]: SDEdit's strength (Meng et al., 2022), whatever the shift; so much of
                the steps are made.

        Raises:
            ConfigError: `start` is out of range.
        """
        if not 0 < start <= 1:
            raise ConfigError(f"strength={start} must lie in (0, 1]: 1 draws anew, less keeps more")
        return objective.grid(max(1, round(self.steps * start)), tokens, start)

    def __call__(
        self,
        predict: Predict,
        x: Tensor,
        *,
        objective: Objective,
        tokens: int,
        free: Tensor | None = None,
        start: float = 1.0,
        noise: Noise | None = None,
    ) -> Tensor:
        """Return the clean latent of `x`.

        Args:
            predict: raw prediction of the net, with guidance mixed in, at one level for the whole `x`.
            x: noise, or a latent noised to `levels(objective, tokens, start)[0]`; of any shape.
            objective: the one that the net was trained for.
            tokens: of a clip, for the shift.
            free: bool, broadcasts against `x`; where false `x` is known and stays. None where all of it is drawn.
            start: see `levels`.
            noise: gives the noise of a step, like `x`; only ancestral sampling asks for it.

        Raises:
            ConfigError: the sampler does not fit the objective, or `start` is out of range.
        """
        solve = SOLVERS[self.fitted(objective).name]
        return solve(predict, x, objective, self.levels(objective, tokens, start).tolist(), free, noise)


def _deviation(x: Tensor, free: Tensor | None) -> Tensor:
    """Return the standard deviation of each sample of `[B, ...]` over what is `free`, its dimensions kept."""
    axes = tuple(range(1, x.dim()))
    if free is None:
        return x.std(axes, keepdim=True)
    free = free.expand_as(x)
    count = free.sum(axes, keepdim=True)
    mean = torch.where(free, x, 0.0).sum(axes, keepdim=True) / count
    squares = torch.where(free, x - mean, 0.0).square().sum(axes, keepdim=True)
    return (squares / (count - 1).clamp(min=1)).sqrt()
