"""Queries and keys made ready for attention: normalised and turned, in fp32 whatever their dtype.

Legend: N tokens, S kinds (queries and keys, or one of them), H heads, K head dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soratrain.models.rope import rotate

EPS = 1e-6


def prepared(x_NSHK: Tensor, weight: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
    """Return each kind `[N, H, K]`, divided by its root mean square (Zhang & Sennrich, 2019), scaled and turned.

    Forwards and backwards are written out, in few passes over memory of which nothing is kept; a compiler gets it
    composed, and fuses it.

    Args:
        x_NSHK: queries, keys or both.
        weight: scale `[S, 1, K]` for a norm over each head, or `[S, H, K]` for one over the full width, fp32.
        rotation: cosines and sines `[N, 1, K/2, 2]`, or None.
    """
    if not torch.compiler.is_compiling():
        return _Prepared.apply(x_NSHK, weight, rotation)  # type: ignore[no-any-return, no-untyped-call]
    wide = x_NSHK.float()
    y_NSHK = wide * _inverse(wide, _dims(weight)) * weight
    kinds = y_NSHK.unbind(1) if rotation is None else [rotate(y_NHK, rotation) for y_NHK in y_NSHK.unbind(1)]
    return tuple(y_NHK.to(x_NSHK.dtype) for y_NHK in kinds)


def _dims(weight: Tensor) -> tuple[int, ...]:
    """Return the dimensions over which a norm goes that has this scale; a single head is its own full width."""
    return (-1,) if weight.shape[-2] == 1 else (-2, -1)


def _inverse(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """Return one over the root mean square along `dims`, which stay."""
    square = torch.linalg.vector_norm(x, dim=dims, keepdim=True).square()
    return (square * (square.numel() / x.numel()) + EPS).rsqrt()


def _turn(x: Tensor, rotation: Tensor, *, back: bool = False) -> None:
    """Turn each pair of adjacent channels of `x`, fp32, in place, or back."""
    turn = torch.view_as_complex(rotation)[:, None]
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turn.conj() if back else turn)


class _Prepared(torch.autograd.Function):
    """Keeps the raw queries and keys alone, which attention's values keep in memory anyway."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, rotation: Tensor | None) -> tuple[Tensor, ...]:
        wide = x.float()
        inverse = _inverse(wide, _dims(weight))
        y = (wide * inverse).mul_(weight)
        if rotation is not None:
            _turn(y, rotation)
        ctx.save_for_backward(x, weight, inverse, rotation)
        return y.to(x.dtype).unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse, rotation = ctx.saved_tensors
        grad = torch.stack(grads, dim=1).float()
        if rotation is not None:
            _turn(grad, rotation, back=True)
        normed = x.float() * inverse
        product = grad * normed
        weight_grad = product.sum(0).sum_to_size(weight.shape)
        mean = product.mul_(weight).mean(_dims(weight), keepdim=True)
        x_grad = grad.mul_(weight).addcmul_(normed, mean, value=-1).mul_(inverse)
        return x_grad.to(x.dtype), weight_grad, None
