"""From any number of tokens to a fixed one: learned queries that ask a clip's tokens, layer by layer (perceiver).

As the resampler of Flamingo (Alayrac et al., 2022) and its successors; the queries also see each other.

Legend: B clips, N tokens of the pack, Q queries, D width, H heads, K head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.models.attention import Packing, attend
from soratrain.models.caption_decoder import norm

PERIODS = (0.25, 256.0)  # seconds of the fastest and of the slowest wave by which time is told
WAVES = 16


def time_features(seconds: Tensor) -> Tensor:
    """Return `[..., 2 * WAVES]` sines and cosines of times in seconds: any frame rate, any duration."""
    ratio = torch.linspace(0, 1, WAVES, device=seconds.device)
    periods = PERIODS[0] * (PERIODS[1] / PERIODS[0]) ** ratio
    angle = seconds.float()[..., None] * (2 * torch.pi / periods)
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


class Asking(nn.Module):
    """One layer: queries ask the clip's tokens, then each other, then think."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_asked, self.norm_own, self.norm_mlp = norm(dim), norm(dim), norm(dim)
        self.q, self.kv, self.out = (nn.Linear(dim, wide * dim, bias=False) for wide in (1, 2, 1))
        self.qkv, self.out_own = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.norms = nn.ModuleList(norm(dim // num_heads) for _ in range(4))
        hidden = int(mlp_ratio * dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for last in (self.out_own, self.down):
            nn.init.zeros_(last.weight)

    def heads(self, x: Tensor, count: int) -> tuple[Tensor, ...]:
        return x.unflatten(-1, (count, self.num_heads, -1)).unbind(1)

    def forward(self, x_QD: Tensor, asking: Packing, tokens_ND: Tensor, packing: Packing) -> Tensor:
        """Return the queries of all clips `[B * Q, D]`, one layer wiser; `tokens_ND` are normed."""
        k_NHK, v_NHK = self.heads(self.kv(tokens_ND), 2)
        (q_QHK,) = self.heads(self.q(self.norm_asked(x_QD)), 1)
        q_QHK, k_NHK = self.norms[0](q_QHK).to(v_NHK.dtype), self.norms[1](k_NHK).to(v_NHK.dtype)
        x_QD = x_QD + self.out(attend(q_QHK, k_NHK, v_NHK, asking, packing).flatten(1))
        q_QHK, k_QHK, v_QHK = self.heads(self.qkv(self.norm_own(x_QD)), 3)
        q_QHK, k_QHK = self.norms[2](q_QHK).to(v_QHK.dtype), self.norms[3](k_QHK).to(v_QHK.dtype)
        x_QD = x_QD + self.out_own(attend(q_QHK, k_QHK, v_QHK, asking, asking).flatten(1))
        return x_QD + self.down(F.gelu(self.up(self.norm_mlp(x_QD)), approximate="tanh"))


class Resampler(nn.Module):
    """Tokens of clips with their times in, answers to learned queries out.

    Args:
        inputs: width of the tokens.
        dim, depth, num_heads, mlp_ratio: of the layers.
        queries: Q.
    """

    def __init__(
        self, *, inputs: int, dim: int, depth: int, num_heads: int, queries: int, mlp_ratio: float = 4.0
    ) -> None:
        super().__init__()
        self.enter, self.time = nn.Linear(inputs, dim), nn.Linear(4 * WAVES, dim, bias=False)
        self.norm_in, self.norm_out = norm(dim), norm(dim)
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.queries.no_muon = True  # type: ignore[attr-defined]
        self.layers = nn.ModuleList(Asking(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))

    def forward(self, tokens_NI: Tensor, times_N2: Tensor, packing: Packing) -> Tensor:
        """Return the answers `[B, Q, D]`.

        Args:
            times_N2: seconds of each token since its clip's beginning, and until its end.
        """
        told = self.time(time_features(times_N2).flatten(1))
        tokens_ND = self.norm_in(self.enter(tokens_NI.to(self.enter.weight.dtype)) + told)
        asking = Packing((len(self.queries),) * len(packing))
        x_QD = self.queries.repeat(len(packing), 1)
        for layer in self.layers:
            x_QD = layer(x_QD, asking, tokens_ND, packing)
        return asking.pad(self.norm_out(x_QD))
