"""A pack of clips as the DiT reads it, and how values of its rows reach its tokens.

Legend: N tokens of the pack, P channels of a patch, D width, R rows: pairs of a clip and a noise level in it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from soratrain.models.attention import Packing
from soratrain.models.modulation import Gated, Normed, Piece
from soratrain.models.qk import EPS

FREQUENCIES = 256  # channels of the noise level's sinusoid, as DiT (Peebles and Xie, 2022)
FLAGS = 4  # bit 0: the token is known, bit 1: its segment was encoded standalone
PIECE = {"cpu": 1 << 18, "gpu": 1 << 22}  # numbers that are worked on at once
ALONE = {"cpu": 1 << 15, "gpu": 1 << 22}  # numbers of a row's tokens, from which on they are worked on alone
COMPOSED = {"cpu": 1 << 19, "gpu": 0}  # numbers of a pack up to which calls take longer than passes over memory


@dataclass(frozen=True)
class Tokens:
    """A pack of clips as the DiT reads it.

    Attributes:
        values: patches `[N, P]`.
        coords: place of each token `[N, 3]`, fp32: time, row, column.
        flags: what is known of each token `[N]`, int64, of `FLAGS`.
        packing: clips within the pack.
        sigma: noise level of each row `[R]`, fp32, 0 clean to 1 noise.
        row_clips: clip of each row `[R]`, int64.
        rows: row of each token `[N]`, int64; None where every clip is one row.
    """

    values: Tensor
    coords: Tensor
    flags: Tensor
    packing: Packing
    sigma: Tensor
    row_clips: Tensor
    rows: Tensor | None = None


@dataclass(frozen=True)
class Spread:
    """Spreads values of rows `[R, ...]` over tokens `[N, ...]`.

    Attributes:
        rows: row of each token `[N]`; None where rows are equally long and stand one after another.
        pieces: in which the tokens are worked through; none where they are too few.
    """

    rows: Tensor | None
    pieces: tuple[Piece, ...] = ()

    @classmethod
    def of(cls, tokens: Tokens, dim: int) -> Spread:
        """Return how the values of a pack's rows, of width `dim`, spread; a device is not waited for."""
        packing, rows, device = tokens.packing, tokens.rows, tokens.values.device
        kind = "cpu" if device.type == "cpu" else "gpu"
        runs = tuple(enumerate(packing.lengths))  # of tokens of one row
        if rows is None:
            rows = None if packing.equal else packing.owner(device)
        elif kind == "cpu":
            values, counts = rows.unique_consecutive(return_counts=True)
            runs = tuple(zip(values.tolist(), counts.tolist(), strict=True))
        else:
            runs = ()
        most, numbers = max(1, PIECE[kind] // dim), packing.total * dim
        if runs and numbers >= ALONE[kind] * len(runs):
            return cls(rows, tuple(Piece(min(most, n - at), row) for row, n in runs for at in range(0, n, most)))
        if numbers <= COMPOSED[kind]:
            return cls(rows)
        if rows is None:
            group = max(1, most // packing.longest)
            spans = [slice(at, min(at + group, len(packing))) for at in range(0, len(packing), group)]
            return cls(rows, tuple(Piece((span.stop - span.start) * packing.longest, span) for span in spans))
        return cls(rows, tuple(Piece(len(some), some) for some in rows.split(most)))

    def norm(self, x_ND: Tensor, shift_RD: Tensor, scale_RD: Tensor) -> Tensor:
        """Return LayerNorm of `x`, times 1 + scale, plus shift, each token with its row's values.

        Computed in fp32, returned in x's dtype. A compiler gets it composed, and fuses it.
        """
        scale_RD = 1 + scale_RD
        if self.pieces and not torch.compiler.is_compiling():
            return Normed.apply(x_ND, shift_RD, scale_RD, self.pieces)  # type: ignore[no-any-return, no-untyped-call]
        x, shift, scale = self._align(F.layer_norm(x_ND.float(), x_ND.shape[-1:], eps=EPS), shift_RD, scale_RD)
        return torch.addcmul(shift, x, scale).reshape(x_ND.shape).to(x_ND.dtype)

    def gate(self, x_ND: Tensor, update_ND: Tensor, gate_RD: Tensor) -> Tensor:
        """Return `x + gate * update`, each token with its row's gate, in x's dtype."""
        if self.pieces and self.rows is not None and not torch.compiler.is_compiling():
            return Gated.apply(x_ND, update_ND, gate_RD, self.pieces)  # type: ignore[no-any-return, no-untyped-call]
        update, gate = self._align(update_ND, gate_RD.to(x_ND.dtype))
        return torch.addcmul(x_ND.reshape(update.shape), update, gate).reshape(x_ND.shape)

    def _align(self, x_ND: Tensor, *values_RD: Tensor) -> tuple[Tensor, ...]:
        """Return x and the values in shapes that broadcast: a view for equal rows, else a gather."""
        if self.rows is None:
            return x_ND.unflatten(0, (len(values_RD[0]), -1)), *(value[:, None] for value in values_RD)
        return x_ND, *(value.index_select(0, self.rows) for value in values_RD)


def sinusoid(sigma_R: Tensor) -> Tensor:
    """Return sines and cosines of 1000 sigma at geometric wavelengths `[R, FREQUENCIES]` (Vaswani et al., 2017)."""
    half = FREQUENCIES // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=sigma_R.device, dtype=torch.float32) / half)
    angles = 1000 * sigma_R.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)
