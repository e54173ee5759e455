"""Optimizers, and how the learning rate moves.

Legend: a matrix parameter of any rank counts as `[rows, columns]`, its first dimension by all the others; `n m` are the
two sorted, n ≤ m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from soratrain.errors import ConfigError

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # the quintic of Jordan et al., "Muon", 2024: steepest at zero
ADAMW_RMS = 0.2  # usual RMS of an AdamW update; Liu et al., "Muon is scalable for LLM training", 2025, section 2.2


def shape_of(parameter: Tensor) -> torch.Size:
    """Return the shape of the whole parameter, also where ZeRO-3 has left only a slice of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def orthogonalize(matrices: Tensor, steps: int = 5) -> Tensor:
    """Return `[batch, n, m]` matrices, n ≤ m, with every singular value pushed to about 1 (0.7 to 1.2), in bf16.

    Newton-Schulz iteration of Jordan et al., 2024: it needs products only, and bf16 is precise enough for it.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


class Muon(Optimizer):
    """Muon for matrices and AdamW for everything else, as one optimizer with one learning rate.

    A matrix's momentum is replaced by its nearest orthogonal matrix (Jordan et al., 2024), scaled by
    0.2·sqrt(max(rows, columns)) so that its RMS is that of an AdamW update (Liu et al., 2025); weight decay is
    decoupled. Groups with `matrix=True` are updated so, the others by AdamW. Matrices of one shape go through the
    iteration together, for they are small and many.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        steps: int = 5,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum, steps=steps, matrix=False
        )
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                (self._muon if group["matrix"] else self._adamw)(params, group)
        return loss

    def _muon(self, params: list[Parameter], group: dict[str, Any]) -> None:
        grads = [param.grad for param in params]
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        directions = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        alike: dict[torch.Size, list[tuple[Parameter, Tensor, bool]]] = {}
        for param, direction in zip(params, directions, strict=True):
            matrix = direction.flatten(1)
            tall = matrix.shape[0] > matrix.shape[1]
            wide = matrix.mT if tall else matrix
            alike.setdefault(wide.shape, []).append((param, wide, tall))
        for shape, members in alike.items():
            updates = orthogonalize(torch.stack([wide for _, wide, _ in members]), group["steps"])
            scale = group["lr"] * ADAMW_RMS * math.sqrt(shape[1])
            for (param, _, tall), update in zip(members, updates, strict=True):
                param.add_((update.mT if tall else update).reshape(param.shape), alpha=-scale)

    def _adamw(self, params: list[Parameter], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        adamw(
            params,
            [param.grad for param in params],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


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
        momentum: of Muon.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    name: str = "adamw"
    lr: float = 1e-3
    betas: Sequence[float] = (0.9, 0.95)
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip: float = 1.0
    momentum: float = 0.95

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ConfigError(f"optimizer.name={self.name!r} is unknown; use adamw or muon")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optimizer.betas={list(self.betas)} must be two numbers in [0, 1)")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optimizer.momentum={self.momentum} must lie in [0, 1)")
        for key in ("lr", "eps", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, key)) and getattr(self, key) >= 0):
                raise ConfigError(f"optimizer.{key}={getattr(self, key)} must be a number of at least 0")

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

    def _build(self, groups: list[dict[str, Any]]) -> Optimizer:
        betas = (float(self.betas[0]), float(self.betas[1]))
        if self.name == "muon":
            return Muon(groups, lr=self.lr, betas=betas, eps=self.eps, momentum=self.momentum)
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
