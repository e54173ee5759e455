"""Denoising diffusion with discrete timesteps: Ho et al., 2020; its schedules, parametrisations and loss weights.

Timestep t of T has ᾱ_t, what is left of the clean latent's variance: noised = √ᾱ clean + √(1-ᾱ) noise. The net sees
sigma = t / T. SNR is ᾱ / (1-ᾱ).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from soratrain.diffusion.flow import shift_of
from soratrain.errors import ConfigError

LINEAR = (1e-4, 0.02)  # first and last beta at 1000 timesteps (Ho et al., 2020, section 4)
COSINE = 0.008  # offset of the cosine (Nichol and Dhariwal, 2021, section 3.2)
LARGEST = 0.999  # beta, as there
PREDICTIONS = ("epsilon", "x0", "v")


@lru_cache(maxsize=16)
def alpha_bars(schedule: str, timesteps: int, zero_terminal_snr: bool) -> Tensor:
    """Return ᾱ of timesteps 0 (clean: 1) to `timesteps`, fp64 `[timesteps + 1]`.

    With `zero_terminal_snr` its root is shifted and scaled so that the last is 0 and the first as it was (Lin et al.,
    2023, algorithm 1).
    """
    with torch.inference_mode(False):  # kept for training too
        if schedule == "linear":
            first, last = (beta * 1000 / timesteps for beta in LINEAR)
            betas = torch.linspace(first, last, timesteps, dtype=torch.float64)
        else:
            place = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
            left = torch.cos((place + COSINE) / (1 + COSINE) * math.pi / 2) ** 2
            betas = 1 - left[1:] / left[:-1]
        bars = torch.cumprod(1 - betas.clamp(max=LARGEST), 0)
        if zero_terminal_snr:
            roots = bars.sqrt()
            bars = ((roots - roots[-1]) * (roots[0] / (roots[0] - roots[-1]))) ** 2
        return torch.cat((torch.ones(1, dtype=torch.float64), bars))


@dataclass(frozen=True, kw_only=True)
class DDPM:
    """Denoising diffusion.

    Attributes:
        prediction: what the net answers and the loss is of: the noise (`epsilon`), the clean latent (`x0`), or
            `v` = √ᾱ noise - √(1-ᾱ) clean (Salimans and Ho, 2022).
        schedule: of ᾱ: `linear` betas (Ho et al., 2020) or `cosine` (Nichol and Dhariwal, 2021).
        timesteps: T.
        zero_terminal_snr: make the last timestep pure noise, which sampling begins with.
        min_snr: most that the clean latent's error weighs, where the error of the noise would weigh it by the SNR
            (gamma of Hang et al., 2023); 0 leaves the loss of the prediction as it is.
        snr_floor: least that it weighs then, of `v` and `x0` (1 is the truncated SNR of Salimans and Ho, 2022). At 0,
            as Hang et al. have it, nothing is learned of pure noise, where the SNR is 0.
        shift: factor of noise against clean at `shift_tokens` tokens, in training and sampling, as `Flow` has it: the
            log-SNR falls by 2 log(shift) (Hoogeboom et al., 2023, eq. 4). It grows with the square root of the
            tokens, that is with an image's side; 0 `shift_tokens` fixes it.

    Raises:
        ConfigError: a value out of range, or noise to be predicted from nothing else.
    """

    prediction: str = "v"
    schedule: str = "cosine"
    timesteps: int = 1000
    zero_terminal_snr: bool = True
    min_snr: float = 0.0
    snr_floor: float = 0.0
    shift: float = 1.0
    shift_tokens: int = 0
    name: str = field(default="ddpm", init=False)

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ConfigError(f"objective.prediction={self.prediction!r} is unknown; use {', '.join(PREDICTIONS)}")
        if self.schedule not in ("linear", "cosine"):
            raise ConfigError(f"objective.schedule={self.schedule!r} is unknown; use linear or cosine")
        if self.timesteps < 2:
            raise ConfigError(f"objective.timesteps={self.timesteps} must be at least 2")
        if self.min_snr < 0 or self.snr_floor < 0 or 0 < self.min_snr < self.snr_floor:
            raise ConfigError(
                f"objective.min_snr={self.min_snr} and objective.snr_floor={self.snr_floor} must be at least 0, and"
                " the floor not above the other"
            )
        if self.shift <= 0 or self.shift_tokens < 0:
            raise ConfigError(
                f"objective.shift={self.shift} must be above 0, objective.shift_tokens={self.shift_tokens} at least 0"
            )
        if self.prediction == "epsilon" and self.zero_terminal_snr:
            raise ConfigError(
                "objective.prediction=epsilon with objective.zero_terminal_snr=true: at the last timestep all is noise,"
                " and to predict it says nothing of the clean latent; use objective.prediction=v, or"
                " objective.zero_terminal_snr=false"
            )

    @property
    def bars(self) -> Tensor:
        """ᾱ of each timestep, `[T + 1]`, fp64, beginning with the clean latent's 1."""
        return alpha_bars(self.schedule, self.timesteps, self.zero_terminal_snr)

    def levels(self, uniform: Tensor, tokens: Tensor) -> Tensor:
        """Return t / T `[B]` of uniform timesteps 1 to T, shifted by token count; see `Objective`."""
        t = (uniform.double() * self.timesteps).long().clamp(max=self.timesteps - 1) + 1
        return self._shifted(t, tokens).float() / self.timesteps

    def coefficients(self, sigma: Tensor) -> tuple[Tensor, Tensor]:
        """Return (√ᾱ, √(1-ᾱ)) of the timestep nearest to `sigma` T."""
        bar = self._bar(sigma)
        return bar.sqrt().to(sigma.dtype), (1 - bar).sqrt().to(sigma.dtype)

    def noised(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return `√ᾱ clean + √(1-ᾱ) noise` (Ho et al., 2020, eq. 4)."""
        a, s = self.coefficients(sigma)
        return a * clean + s * noise

    def target(self, clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Return what `prediction` names."""
        a, s = self.coefficients(sigma)
        return {"epsilon": noise, "x0": clean}.get(self.prediction, a * noise - s * clean)

    def weight(self, sigma: Tensor) -> Tensor:
        """Return the min-SNR weight of the prediction's error (Hang et al., 2023, section 3.4).

        An error of the noise is that of the clean latent times √SNR, one of v times √(SNR + 1); so the weight of the
        clean latent's error, min(SNR, gamma), is divided by SNR and by SNR + 1.
        """
        if not self.min_snr:
            return torch.ones_like(sigma)
        bar = self._bar(sigma)
        snr = bar / (1 - bar)
        if self.prediction == "epsilon":
            weight = snr.clamp(max=self.min_snr) / snr
        else:
            weight = snr.clamp(self.snr_floor, self.min_snr) / (snr + 1 if self.prediction == "v" else 1)
        return weight.to(sigma.dtype)

    def to_clean(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the clean latent that the prediction implies."""
        a, s = self.coefficients(sigma)
        if self.prediction == "x0":
            return prediction
        return a * noised - s * prediction if self.prediction == "v" else (noised - s * prediction) / a

    def to_noise(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return the noise that the prediction implies, at a level above 0."""
        a, s = self.coefficients(sigma)
        if self.prediction == "epsilon":
            return prediction
        return s * noised + a * prediction if self.prediction == "v" else (noised - a * prediction) / s

    def to_velocity(self, noised: Tensor, prediction: Tensor, sigma: Tensor) -> Tensor:
        """Return noise - clean."""
        return self.to_noise(noised, prediction, sigma) - self.to_clean(noised, prediction, sigma)

    def grid(self, steps: int, tokens: int, start: float = 1.0) -> Tensor:
        """Return timesteps evenly spaced (Lin et al., 2023: trailing) but for the shift, from `start` T on, and 0.

        They are fewer than asked for where timesteps fall together; see `Objective`.
        """
        last = torch.tensor(round(start * self.timesteps)).clamp(min=1)
        if start < 1:
            last = self._shifted(last, torch.tensor(tokens), back=True)
        t = torch.linspace(float(last), 0, steps + 1, dtype=torch.float64)[:-1]
        t = self._shifted(t.round().long().clamp(min=1), torch.tensor(tokens))
        return torch.cat((t.unique_consecutive().float() / self.timesteps, torch.zeros(1)))

    def _bar(self, sigma: Tensor) -> Tensor:
        t = (sigma.double() * self.timesteps).round().long()
        return self.bars.to(sigma.device)[t]

    def _shifted(self, t: Tensor, tokens: Tensor, *, back: bool = False) -> Tensor:
        """Return the timesteps 1 to T that are nearest, in log-SNR, to the shifted ones; `back` undoes the shift."""
        noisiness = -0.5 * torch.logit(self.bars[1:])  # log of noise over clean, rising; infinite where all is noise
        shift = shift_of(self.shift, self.shift_tokens, tokens).double().log()
        wanted = noisiness[t - 1] + (-shift if back else shift)
        above = torch.searchsorted(noisiness, wanted).clamp(max=self.timesteps - 1)
        below = (above - 1).clamp(min=0)
        return torch.where(wanted - noisiness[below] < noisiness[above] - wanted, below, above) + 1
