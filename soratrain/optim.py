"""Which optimizer moves which parameter, and how the learning rate moves."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from soratrain.errors import ConfigError
from soratrain.muon import Muon


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also where ZeRO-3 has left only a slice of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


@dataclass(frozen=True, kw_only=True)
class OptimizerFactory:
    """Builds one optimizer over named parameters.

    Weights of two or more dimensions decay; biases, norms and other vectors do not. Under `muon` a parameter is a
    matrix unless it is a vector or carries `no_muon = True`, as embeddings and output heads should.

    Attributes:
        name: `adamw` or `muon`.
        lr: peak learning rate, which the schedule scales.
        betas, eps: of AdamW.
        weight_decay: decoupled, times the learning rate.
        clip: largest norm of the whole gradient; 0 leaves it alone. The trainer clips.
        clip_adaptive: above 0, the norm is also limited to the running mean of earlier steps' norms plus so many of
            their deviations (`AdaptiveClip`).
        momentum: of Muon.
        block: most rows that Muon makes orthogonal together, 0 for whole matrices; 64 costs a tenth at width 256.
        disc: the optimizer of a discriminator, where a stage has one.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: Sequence[float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    clip_adaptive: float = 0.0
    momentum: float = 0.95
    block: int = 0
    disc: OptimizerFactory | None = None

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ConfigError(f"optimizer.name={self.name!r} is unknown; use adamw or muon")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum} must lie in [0, 1)")
        for key in ("lr", "eps", "weight_decay", "clip", "clip_adaptive", "block"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must be a number of at least 0")

        if self.disc is not None and self.disc.clip_adaptive:
            raise ConfigError("optimizer.disc.clip_adaptive: a discriminator's gradient is clipped to disc.clip; set 0")

    def __call__(self, named_params: Iterable[tuple[str, Parameter]]) -> Optimizer:
        """Return the optimizer over those of `named_params` that require gradients.

        Raises:
            ConfigError: there are none.
        """
        kinds: dict[str, list[Parameter]] = {"matrix": [], "decay": [], "plain": []}
        for _, param in named_params:
            if param.requires_grad:
                kinds[self._kind(param)].append(param)
        if not any(kinds.values()):
            raise ConfigError("there is nothing to optimize: every parameter is frozen")
        groups: list[dict[str, Any]] = [
            {"params": params, "weight_decay": 0.0 if kind == "plain" else self.weight_decay}
            | ({"matrix": kind == "matrix"} if self.name == "muon" else {})
            for kind, params in kinds.items()
            if params
        ]
        return self._build(groups)

    def numbers(self, named_params: Iterable[tuple[str, Parameter]]) -> int:
        """Return how many numbers the optimizer keeps for those of `named_params` that require gradients.

        Two moments for each; under Muon one for those of a matrix.
        """
        found = [param for _, param in named_params if param.requires_grad]
        return sum((1 if self._kind(param) == "matrix" else 2) * shape_of(param).numel() for param in found)

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        betas = (float(self.betas[0]), float(self.betas[1]))
        if self.name == "muon":
            return Muon(groups, lr=self.lr, betas=betas, eps=self.eps, momentum=self.momentum, block=self.block)
        return torch.optim.AdamW(groups, lr=self.lr, betas=betas, eps=self.eps, fused=True)

    def _kind(self, param: Parameter) -> str:
        if len(shape_of(param)) < 2:
            return "plain"
        return "matrix" if self.name == "muon" and not getattr(param, "no_muon", False) else "decay"


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How the learning rate moves over a run, as a factor of its peak.

    After a linear warm-up: `constant`; `cosine`, down to `final` at the last step; or `wsd` (warm-up, stable, decay):
    constant, then straight down to `final` over the last `decay` of the run (Hu et al., "MiniCPM", 2024).

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    name: str = "cosine"
    warmup_steps: int = 100
    final: float = 0.1
    decay: float = 0.2

    def __post_init__(self) -> None:
        if self.name not in ("cosine", "constant", "wsd"):
            raise ConfigError(f"schedule.name={self.name!r} is unknown; use cosine, constant or wsd")
        if self.warmup_steps < 0:
            raise ConfigError(f"schedule.warmup_steps={self.warmup_steps} must be at least 0")
        if not 0 <= self.final <= 1:
            raise ConfigError(f"schedule.final={self.final} must lie in [0, 1]: it is a fraction of optimizer.lr")
        if not 0 < self.decay <= 1:
            raise ConfigError(f"schedule.decay={self.decay} must lie in (0, 1]: it is a fraction of the run")

    def __call__(self, step: int, max_steps: int) -> float:
        """Return the factor for the update that follows `step` earlier ones in a run of `max_steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.name == "constant":
            return 1.0
        start = self.warmup_steps if self.name == "cosine" else max(self.warmup_steps, (1 - self.decay) * max_steps)
        progress = min(max((step - start) / max(max_steps - 1 - start, 1), 0.0), 1.0)
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.name == "cosine" else 1 - progress
        return self.final + (1 - self.final) * fall
