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
from soratrain.models.qk import EPS

FREQUENCIES = 256  # channels of the noise level's sinusoid, as DiT (Peebles and Xie, 2022)
FLAGS = 4  # bit 0: the token is known, bit 1: its segment was encoded standalone
RUN_NUMBERS = 1 << 15  # of a row, from which on it is normalised alone: 22 us of memory saved against 25 us of calls


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
        runs: row and length of each stretch of tokens of one row, where taking them one by one is faster; else empty.
    """

    rows: Tensor | None
    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, tokens: Tokens, dim: int) -> Spread:
        """Return how the values of a pack's rows, of width `dim`, spread."""
        packing, rows = tokens.packing, tokens.rows
        runs = tuple(enumerate(packing.lengths))
        if rows is None:
            rows = None if packing.equal else packing.owner(tokens.values.device)
        elif tokens.values.device.type == "cpu":
            values, counts = rows.unique_consecutive(return_counts=True)
            runs = tuple(zip(values.tolist(), counts.tolist(), strict=True))
        worth = tokens.values.device.type == "cpu" and packing.total * dim >= RUN_NUMBERS * len(runs)
        return cls(rows, runs if worth else ())

    def norm(self, x_ND: Tensor, shift_RD: Tensor, scale_RD: Tensor) -> Tensor:
        """Return LayerNorm of `x`, times 1 + scale, plus shift, each token with its row's values; in fp32."""
        shape, scale_RD = x_ND.shape[-1:], 1 + scale_RD
        if not torch.compiler.is_compiling() and self.runs:  # one pass over memory, of which nothing is kept
            parts = zip(*self._split(x_ND), *self._pick(scale_RD, shift_RD), strict=True)
            return torch.cat([F.layer_norm(part, shape, scale, shift, EPS) for part, scale, shift in parts])
        x, shift, scale = self._align(F.layer_norm(x_ND.float(), shape, eps=EPS), shift_RD, scale_RD)
        return torch.addcmul(shift, x, scale).reshape(x_ND.shape)

    def gate(self, x_ND: Tensor, update_ND: Tensor, gate_RD: Tensor) -> Tensor:
        """Return `x + gate * update`, each token with its row's gate, in x's dtype."""
        gate_RD = gate_RD.to(x_ND.dtype)
        if not torch.compiler.is_compiling() and self.runs and self.rows is not None:
            parts = zip(*self._split(x_ND, update_ND), *self._pick(gate_RD), strict=True)
            return torch.cat([torch.addcmul(part, update, gate) for part, update, gate in parts])
        update, gate = self._align(update_ND, gate_RD)
        return torch.addcmul(x_ND.reshape(update.shape), update, gate).reshape(x_ND.shape)

    def _split(self, *values_ND: Tensor) -> list[tuple[Tensor, ...]]:
        return [value.split([length for _, length in self.runs]) for value in values_ND]

    def _pick(self, *values_RD: Tensor) -> list[list[Tensor]]:
        return [[value[row] for row, _ in self.runs] for value in values_RD]

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
