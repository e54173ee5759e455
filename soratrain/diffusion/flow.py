"""Rectified flow: Liu et al., 2022; logit-normal noise levels and their shift: Esser et al., 2024 (SD3)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from soratrain.errors import ConfigError

EDGE = 1e-4  # levels stay this far from 0 and 1, where a conversion would divide by 0


def shifted(sigma: Tensor, shift: float | Tensor) -> Tensor:
    """Move noise levels towards noise (`shift` above 1) or clean; 1 is the identity (Esser et al., 2024, eq. 23)."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def shift_of(shift: float, shift_tokens: int, tokens: Tensor | int) -> Tensor:
    """Return the shift of clips of so many tokens: longer ones need more noise to hide as much (Esser et al.).

    It is `shift` at `shift_tokens` tokens and grows with the square root of their number, or stays where that is 0.
    """
    count = torch.as_tensor(tokens, dtype=torch.float32)
    return shift * (torch.sqrt(count / shift_tokens) if shift_tokens else torch.ones_like(count))


@dataclass(frozen=True, kw_only=True)
class Flow:
    """Rectified flow: a straight path from clean to noise, along a velocity.

    What the net itself answers is a choice; the loss is the velocity's error all the same. With `velocity` it must hand
    the input's noise through all its layers; with `balanced` the velocity's best linear guess from the input alone is
    added outside the net, which is left with what remains, of variance 1 at every level: nearly the clean latent where
    there is much noise, nearly the noise where there is little (as the preconditioning of Karras et al., 2022).

    Attributes:
        prediction: `velocity` or `balanced`.
        logit_mean, logit_std: of the normal whose logistic gives the level.
        shift: at `shift_tokens` tokens; it grows with the square root of their number. 0 `shift_tokens` fixes it.
        clean_weight: 0 weighs the velocity's error alike at all levels, 1 the clean latent's, which is sigma times it.

    Raises:
        ConfigError: a value out of range.
    """

    logit_mean: float = 0.0
    logit_std: float = 1.0
    shift: float = 1.0
    shift_tokens: int = 0
    clean_weight: float = 0.0
    prediction: str = "velocity"
    name: str = field(default="flow", init=False)

    def __post_init__(self) -> None:
        if self.prediction not in ("velocity", "balanced"):
            raise ConfigError(f"objective.prediction={self.prediction!r} is unknown; use velocity or balanced")
        if self.logit_std <= 0 or self.shift <= 0 or self.shift_tokens < 0:
            raise ConfigError(
                f"objective.logit_std={self.logit_std} and objective.shift={self.shift} must be above 0,"
                f" objective.shift_tokens={self.shift_tokens} at least 0"
            )

    def shift_at(self, tokens: Tensor | int) -> Tensor:
        """Return the shift of clips of so many tokens."""
        return shift_of(self.shift, self.shift_tokens, tokens)

    def levels(self, uniform: Tensor, tokens: Tensor) -> Tensor:
        """Return logit-normal levels `[B]`, shifted by token count; see `Objective`."""
        normal = torch.special.ndtri(uniform.double().clamp(1e-7, 1 - 1e-7)).float()
        sigma = torch.sigmoid(self.logit_mean + self.logit_std * normal)
        return shifted(sigma, self.shift_at(tokens)).clamp(EDGE, 1 - EDGE)

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (1 - sigma, sigma); see `Objective`."""
        return 1 - sigma, sigma

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return `(1 - sigma) clean + sigma noise` (Liu et al., 2022, eq. 1)."""
        return torch.lerp(clean, noise, sigma)

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity, noise - clean; or what remains of it, see `prediction`."""
        if self.prediction == "velocity":
            return noise - clean
        guess, remainder = self._split(sigma)
        return (noise - clean - guess * self.noised(clean, noise, sigma)) / remainder

    def weight(self, sigma: Tensor) -> Tensor:
        """Return what makes the prediction's error the velocity's, times sigma ** (2 clean_weight)."""
        weight = sigma ** (2 * self.clean_weight)
        return weight if self.prediction == "velocity" else weight * self._split(sigma)[1] ** 2

    def to_velocity(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the velocity that the prediction implies."""
        if self.prediction == "velocity":
            return prediction
        guess, remainder = self._split(sigma)
        return guess * noised + remainder * prediction

    def to_clean(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean latent that the prediction implies."""
        return noised - sigma * self.to_velocity(noised, prediction, sigma)

    def to_noise(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that the prediction implies."""
        return noised + (1 - sigma) * self.to_velocity(noised, prediction, sigma)

    @staticmethod
    def _split(sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return the slope of the best linear guess of the velocity from the noised latent, and what it leaves open.

        Clean latents have mean 0 and variance 1, so the noised one has (1 - sigma)^2 + sigma^2, its covariance with the
        velocity is 2 sigma - 1, and the guess leaves a deviation of 1 over the noised one's.
        """
        variance = (1 - sigma) ** 2 + sigma**2
        return (2 * sigma - 1) / variance, variance**-0.5

    def grid(self, steps: int, tokens: int, start: float = 1.0) -> Tensor:
        """Return levels that are evenly spaced but for the shift, which is training's; see `Objective`."""
        shift = self.shift_at(tokens)
        begin = 1.0 if start == 1 else float(shifted(torch.tensor(start), 1 / shift))
        levels = shifted(torch.linspace(begin, 0, steps + 1), shift)
        levels[0] = start  # which a small shift's rounding misses, and of 1 it would go beyond pure noise
        return levels
