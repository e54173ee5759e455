"""LayerNorm and gates with values of rows, forwards and backwards written out, a piece of the tokens at a time.

No copy of the values for every token exists but for one piece, and nothing is kept for the backward pass but what goes
in and each token's mean and deviation.

Legend: N tokens of the pack, D width, R rows: pairs of a clip and a noise level in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from soratrain.models.qk import EPS


@dataclass(frozen=True)
class Piece:
    """Tokens that are worked on at once; they stand one after another.

    Attributes:
        count: how many.
        rows: the row of all, or of each; or rows that follow each other and have equally many of them.
    """

    count: int
    rows: int | slice | Tensor

    def cut(self, x_ND: Tensor) -> Tensor:
        """Return these tokens, in which the values of `spread` broadcast."""
        return x_ND.unflatten(0, (self.rows.stop - self.rows.start, -1)) if isinstance(self.rows, slice) else x_ND

    def spread(self, values_RD: Tensor) -> Tensor:
        """Return the rows' values for these tokens."""
        if isinstance(self.rows, Tensor):
            return values_RD.index_select(0, self.rows)
        return values_RD[self.rows, None] if isinstance(self.rows, slice) else values_RD[self.rows]

    def collect(self, sums_RD: Tensor, x: Tensor) -> None:
        """Add what these tokens have to their rows' sums."""
        if isinstance(self.rows, Tensor):
            sums_RD.index_add_(0, self.rows, x.to(sums_RD.dtype))
        else:
            sums_RD[self.rows] += x.sum(-2, dtype=sums_RD.dtype)


def taken(pieces: Sequence[Piece], *values_ND: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield each piece and views of what its tokens have."""
    counts = [piece.count for piece in pieces]
    for piece, *parts in zip(pieces, *(value.split(counts) for value in values_ND), strict=True):
        yield piece, *map(piece.cut, parts)


class Normed(torch.autograd.Function):
    """LayerNorm of `x`, times the rows' scale, plus their shift; computed in fp32, returned in x's dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shift: Tensor, scale: Tensor, pieces: Sequence[Piece]) -> Tensor:
        width, out, moments = x.shape[-1:], torch.empty_like(x), list[Tensor]()
        for piece, part, into in taken(pieces, x, out):
            if isinstance(row := piece.rows, int):
                y, *found = torch.native_layer_norm(part.float(), width, scale[row], shift[row], EPS)
                into.copy_(y)
            else:
                y, *found = torch.native_layer_norm(part.float(), width, None, None, EPS)
                torch.addcmul(piece.spread(shift), y, piece.spread(scale), out=into)
            moments += found
        ctx.save_for_backward(x, scale, *moments)
        ctx.pieces = pieces
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, *moments = ctx.saved_tensors
        width, x_grad = x.shape[-1:], torch.empty_like(x)
        shift_grad, scale_grad = torch.zeros_like(scale), torch.zeros_like(scale)
        parts = zip(taken(ctx.pieces, x, grad, x_grad), moments[::2], moments[1::2], strict=True)
        for (piece, part, up, into), mean, inverse in parts:
            part, up = part.float(), up.float()
            if isinstance(row := piece.rows, int):
                asked, weights = [True, True, True], [scale[row], scale[row]]
            else:
                piece.collect(shift_grad, up)
                piece.collect(scale_grad, torch.addcmul(-mean * inverse, part, inverse).mul_(up))
                asked, weights, up = [True, False, False], [None, None], up * piece.spread(scale)
            down, *sums = torch.ops.aten.native_layer_norm_backward(up, part, width, mean, inverse, *weights, asked)
            if isinstance(row, int):
                scale_grad[row] += sums[0]
                shift_grad[row] += sums[1]
            into.copy_(down)
        return x_grad, shift_grad, scale_grad, None


class Gated(torch.autograd.Function):
    """`x` plus the rows' gate times `update`, in x's dtype; sums over tokens are fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, update: Tensor, gate: Tensor, pieces: Sequence[Piece]) -> Tensor:
        ctx.save_for_backward(update, gate)
        ctx.pieces = pieces
        out, gate = torch.empty_like(x), gate.to(x.dtype)
        for piece, part, change, into in taken(pieces, x, update, out):
            torch.addcmul(part, change, piece.spread(gate), out=into)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        update, gate = ctx.saved_tensors
        update_grad, gate_grad, rough = torch.empty_like(update), torch.zeros_like(gate), gate.to(grad.dtype)
        for piece, change, up, into in taken(ctx.pieces, update, grad, update_grad):
            torch.mul(up, piece.spread(rough), out=into)
            piece.collect(gate_grad, up * change)
        return grad, update_grad, gate_grad, None
