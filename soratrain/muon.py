"""Muon: an optimizer that turns every matrix by the same amount in all directions.

Legend: a parameter of two or more dimensions counts as a matrix `[rows, columns]`, its first dimension by all the
others; `n m` are these two sorted, n ≤ m.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.adamw import adamw

# The best odd quintics one after another, for singular values from 1e-3 to 1: Amsel et al., 2025, algorithm 1.
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
CACHED = 1 << 18  # numbers iterated together on a CPU: more do not stay in its cache
SAFETY = 1.01  # shrinks each step's input, so that rounding cannot push a singular value out of the quintic's range
ADAMW_RMS = 0.2  # usual RMS of an AdamW update; Liu et al., "Muon is scalable for LLM training", 2025, section 2.2


def product_dtype(device: torch.device) -> torch.dtype:
    """Return the type in which matrix products are fastest: bf16, but fp32 on a CPU that has no bf16 tiles (AMX)."""
    return torch.float32 if device.type == "cpu" and not torch.cpu._is_amx_tile_supported() else torch.bfloat16


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return `[batch, n, m]` matrices, n ≤ m, with singular values above 1e-3 of their norm pushed to 1 (0.88 to 1.12).

    Products only: the Newton-Schulz iteration of Jordan et al., 2024, with the coefficients of Amsel et al., 2025. In
    fp32 long matrices are iterated through their `[n, n]` Gram matrix, which is the same in exact arithmetic and
    cheaper from m = 2n on; bf16 is too coarse for that.
    """
    x = matrices.to(dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7) / SAFETY
    through_gram = dtype == torch.float32 and x.shape[-1] >= 2 * x.shape[-2]
    gram, product = x @ x.mT, None
    for index, (a, b, c) in enumerate(POLAR_EXPRESS):
        last = index == len(POLAR_EXPRESS) - 1
        a, b, c = (a, b, c) if last else (a / SAFETY, b / SAFETY**3, c / SAFETY**5)
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        if through_gram:
            factor.diagonal(dim1=-2, dim2=-1).add_(a)
            product = factor if product is None else factor @ product
            gram = gram if last else (factor @ gram) @ factor
        else:
            x = torch.baddbmm(x, factor, x, beta=a)
            gram = gram if last else x @ x.mT
    return x if product is None else product @ x


def parts_of(rows: int, block: int) -> int:
    """Return into how many equal parts of at most `block` rows to cut; 1 where `block` is 0."""
    parts = -(-rows // block) if block else 1
    while rows % parts:
        parts += 1
    return parts


class Muon(Optimizer):
    """Muon for matrices and AdamW for everything else, as one optimizer with one learning rate.

    A matrix's momentum is replaced by about the nearest orthogonal matrix (Jordan et al., 2024), scaled by
    0.2·sqrt(max(rows, columns)) so that its RMS is that of an AdamW update (Liu et al., 2025); weight decay is
    decoupled. Groups with `matrix=True` are updated so, the others by AdamW. Matrices of one shape go through the
    iteration together, for they are small and many. With `block` a matrix is cut along its shorter side into parts of
    at most so many rows, each made orthogonal by itself: far fewer operations, as the cost grows with the cube of the
    rows (block-wise Muon: Khaled et al., "MuonBP", 2025). Every update needs whole matrices, so ZeRO's flat slices of
    gradients are not for it.
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
        block: int = 0,
    ) -> None:
        defaults = dict(
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=momentum, block=block, matrix=False
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
        grads = [param.grad for param in params if param.grad is not None]
        for param in params:
            if "momentum" not in self.state[param]:
                self.state[param]["momentum"] = torch.zeros_like(param)
        buffers = [self.state[param]["momentum"] for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        directions = torch._foreach_lerp(grads, buffers, group["momentum"])  # Nesterov
        if group["weight_decay"]:
            torch._foreach_mul_(list(params), 1 - group["lr"] * group["weight_decay"])
        alike: dict[tuple[int, int], list[tuple[Parameter, Tensor, bool]]] = {}
        for param, direction in zip(params, directions, strict=True):
            matrix = direction.flatten(1)
            tall = matrix.shape[0] > matrix.shape[1]
            wide = matrix.mT if tall else matrix
            wide = wide.reshape(parts_of(wide.shape[0], group["block"]), -1, wide.shape[1])
            alike.setdefault((wide.shape[1], wide.shape[2]), []).append((param, wide, tall))
        for (n, m), members in alike.items():
            together = torch.cat([wide for _, wide, _ in members])
            size = max(CACHED // (n * m), 1) if together.device.type == "cpu" else len(together)
            dtype = product_dtype(together.device)
            updates = torch.cat([orthogonalize(chunk, dtype) for chunk in together.split(size)])
            scale = group["lr"] * ADAMW_RMS * math.sqrt(max(n, m))
            for (param, _, tall), update in zip(
                members, updates.split([len(wide) for _, wide, _ in members]), strict=True
            ):
                whole = update.flatten(0, 1)
                param.add_((whole.mT if tall else whole).reshape(param.shape), alpha=-scale)

    def _adamw(self, params: list[Parameter], group: dict[str, Any]) -> None:
        for param in params:
            state = self.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)
        states = [self.state[param] for param in params]
        adamw(
            list(params),
            [param.grad for param in params if param.grad is not None],
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
