"""Diffusion transformer over flat tokens: clips of any size and duration in one pack, each seeing only itself.

A batch of equal clips is a pack of equal lengths. Modulation is computed once per distinct noise level of a clip, then
spread over its tokens (adaLN-single: Chen et al., "PixArt-alpha", 2023). Gates, head and cross-attention's output start
at zero, so an untrained net returns exactly 0.

Legend: N tokens of the pack, P channels of a patch, D width, H heads, K head dim, B clips, M text tokens, E text width,
R rows: pairs of a clip and a noise level in it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from soratrain.errors import ConfigError
from soratrain.models.attention import Packing, attend, attention_ops
from soratrain.models.patchify import Patch
from soratrain.models.qk import EPS, prepared
from soratrain.models.rope import rotations, split_axes
from soratrain.models.tokens import FLAGS, FREQUENCIES, Spread, Tokens, sinusoid

RECOMPUTE = ("none", "selective", "full")
ACTIVATIONS = {"gelu_tanh": nn.GELU(approximate="tanh"), "gelu": nn.GELU(), "silu": nn.SiLU()}


class Sharing(Protocol):
    """How ranks share the tokens of a pack; see soratrain/distributed/sequence.py, which also takes over attention."""

    def part_of(
        self, tokens: Tokens, text_ME: Tensor, text_packing: Packing, sigma_RD: Tensor
    ) -> tuple[Tokens, Tensor, Packing, Tensor]:
        """Return this rank's tokens, their clips' texts and their rows' conditions."""
        ...

    def whole(self, x_nP: Tensor, packing: Packing) -> Tensor:
        """Return all ranks' tokens again."""
        ...


class QKNorm(nn.Module):
    """Scale of the RMSNorm of queries or keys, over each head, or over the full width (as Wan) where `full` is true."""

    def __init__(self, *, dim: int, num_heads: int, full: bool) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(dim if full else dim // num_heads, eps=EPS)
        self.shape = (num_heads if full else 1, dim // num_heads)

    def forward(self) -> Tensor:
        """Return the scale `[H, K]`, or `[1, K]` where heads share it; as a call, since ZeRO-3 gathers at calls."""
        return self.norm.weight.float().view(self.shape)


class SelfAttention(nn.Module):
    """Attention among the tokens of one clip, their places rotated into queries and keys."""

    def __init__(self, *, dim: int, num_heads: int, qk_norm_full: bool) -> None:
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.attend: Callable[..., Tensor] = attend
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm_q = QKNorm(dim=dim, num_heads=num_heads, full=qk_norm_full)
        self.norm_k = QKNorm(dim=dim, num_heads=num_heads, full=qk_norm_full)

    def forward(self, x_ND: Tensor, packing: Packing, rotation: Tensor) -> Tensor:
        qk_NSHK, v_NSHK = self.qkv(x_ND).unflatten(-1, (3, *self.heads)).split((2, 1), dim=1)
        q_NHK, k_NHK = prepared(qk_NSHK, torch.stack((self.norm_q(), self.norm_k())), rotation)
        return self.out(self.attend(q_NHK, k_NHK, v_NSHK[:, 0], packing, packing).flatten(1))


class CrossAttention(nn.Module):
    """Visual tokens ask, text tokens answer."""

    def __init__(self, *, dim: int, num_heads: int, qk_norm_full: bool) -> None:
        super().__init__()
        self.heads = (num_heads, dim // num_heads)
        self.attend: Callable[..., Tensor] = attend
        self.q, self.kv, self.out = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)
        self.norm_q = QKNorm(dim=dim, num_heads=num_heads, full=qk_norm_full)
        self.norm_k = QKNorm(dim=dim, num_heads=num_heads, full=qk_norm_full)

    def forward(self, x_ND: Tensor, text_MD: Tensor, packing: Packing, text_packing: Packing) -> Tensor:
        k_MSHK, v_MSHK = self.kv(text_MD).unflatten(-1, (2, *self.heads)).split(1, dim=1)
        (q_NHK,) = prepared(self.q(x_ND).unflatten(-1, (1, *self.heads)), self.norm_q()[None], None)
        (k_MHK,) = prepared(k_MSHK, self.norm_k()[None], None)
        return self.out(self.attend(q_NHK, k_MHK, v_MSHK[:, 0], packing, text_packing).flatten(1))


class Block(nn.Module):
    """Self-attention, cross-attention and MLP; the first and last modulated by the noise level."""

    def __init__(
        self,
        *,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qk_norm_full: bool,
        cross_norm: bool,
        activation: str,
        selective: bool = False,
    ) -> None:
        super().__init__()
        self.selective = selective
        self.modulation = nn.Parameter(torch.zeros(6, dim))
        self.attention = SelfAttention(dim=dim, num_heads=num_heads, qk_norm_full=qk_norm_full)
        self.norm_cross = nn.LayerNorm(dim, eps=EPS) if cross_norm else nn.Identity()
        self.cross = CrossAttention(dim=dim, num_heads=num_heads, qk_norm_full=qk_norm_full)
        hidden = int(mlp_ratio * dim)
        self.up, self.down, self.activation = nn.Linear(dim, hidden), nn.Linear(hidden, dim), ACTIVATIONS[activation]
        self.modulation.no_muon = True  # type: ignore[attr-defined]
        initialize(self)
        nn.init.zeros_(self.cross.out.weight)

    def forward(
        self,
        x_ND: Tensor,
        condition_R6D: Tensor,
        text_MD: Tensor,
        spread: Spread,
        packing: Packing,
        text_packing: Packing,
        rotation: Tensor,
    ) -> Tensor:
        shift_self, scale_self, gate_self, shift_mlp, scale_mlp, gate_mlp = (condition_R6D + self.modulation).unbind(1)
        see, read, think = self._see, self._read, self._think
        if self.selective and torch.is_grad_enabled():
            see, read, think = partial(again, see, keep=True), partial(again, read, keep=True), partial(again, think)
        x_ND = spread.gate(x_ND, see(x_ND, shift_self, scale_self, spread, packing, rotation), gate_self)
        x_ND = x_ND + read(x_ND, text_MD, packing, text_packing)
        return spread.gate(x_ND, think(x_ND, shift_mlp, scale_mlp, spread), gate_mlp)

    def _see(
        self, x_ND: Tensor, shift: Tensor, scale: Tensor, spread: Spread, packing: Packing, turn: Tensor
    ) -> Tensor:
        return self.attention(spread.norm(x_ND, shift, scale), packing, turn)

    def _read(self, x_ND: Tensor, text_MD: Tensor, packing: Packing, text_packing: Packing) -> Tensor:
        return self.cross(self.norm_cross(x_ND), text_MD, packing, text_packing)

    def _think(self, x_ND: Tensor, shift: Tensor, scale: Tensor, spread: Spread) -> Tensor:
        return self.down(self.activation(self.up(spread.norm(x_ND, shift, scale))))


def again(function: Callable[..., Tensor], *arguments: object, keep: bool = False) -> Tensor:
    """Return `function(*arguments)`, which the backward pass computes again; with `keep`, but for what is dear.

    That is what attention and each matrix product gives: what is left to do again is a pass over memory.
    """
    if not keep:
        return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
    contexts = partial(create_selective_checkpoint_contexts, [torch.ops.aten.addmm.default, *attention_ops()])
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False, context_fn=contexts)  # type: ignore[no-any-return]


def initialize(module: nn.Module) -> None:
    """Draw the weights of all linear layers in `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)


class DiT(nn.Module):
    """Noised patches, their places, noise levels and text in; one prediction per patch out.

    Args:
        channels: latent channels C.
        dim: width D.
        depth: blocks.
        num_heads: heads; `dim / num_heads` is even and at least 6.
        text_dim: width E of the text features.
        patch: latent positions of one token along t, y and x.
        mlp_ratio: hidden width of the MLP over `dim`.
        rope_time: `seconds` (frame rates mix) or `index` (one unit a latent step, as Wan).
        qk_norm_full: normalise queries and keys over the full width, as Wan, and not over each head.
        cross_norm: an affine norm before cross-attention, as Wan.
        pooled_text: add the mean text feature to the modulation.
        activation: of the MLP: `gelu_tanh`, `gelu` or `silu`.
        recompute: what the backward pass computes again, instead of keeping it: `none`; `selective`: the MLP up to its
            last product, and everywhere what is no product nor attention; `full`: each block. Gradients are the same.
    """

    def __init__(
        self,
        *,
        channels: int,
        dim: int,
        depth: int,
        num_heads: int,
        text_dim: int,
        patch: Patch = (1, 2, 2),
        mlp_ratio: float = 4.0,
        rope_time: str = "seconds",
        qk_norm_full: bool = False,
        cross_norm: bool = True,
        pooled_text: bool = False,
        activation: str = "gelu_tanh",
        recompute: str = "none",
    ) -> None:
        super().__init__()
        if recompute not in RECOMPUTE:
            raise ConfigError(f"dit.recompute={recompute!r} is unknown; use one of {', '.join(RECOMPUTE)}")
        if min(dim, depth, num_heads, *patch) < 1:
            raise ValueError(
                f"dim={dim}, depth={depth}, num_heads={num_heads} and patch={list(patch)} must be at least 1"
            )
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} do not divide dim={dim}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation {activation!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
        if rope_time not in ("seconds", "index"):
            raise ValueError(f"rope_time {rope_time!r} is unknown; use seconds or index")
        self.channels, self.dim, self.depth, self.num_heads = channels, dim, depth, num_heads
        self.recompute = recompute
        self.patch: Patch = (patch[0], patch[1], patch[2])
        self.patch_size = math.prod(self.patch)
        self.rope_time, self.axes = rope_time, split_axes(dim // num_heads)
        width = channels * self.patch_size
        self.embed = nn.Linear(width, dim)
        self.embed_flags = nn.Embedding(FLAGS, dim)
        self.embed_text = nn.Sequential(nn.Linear(text_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim))
        self.embed_sigma = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.embed_pooled = nn.Linear(text_dim, dim) if pooled_text else None
        self.condition = nn.Linear(dim, 6 * dim)
        self.blocks = nn.ModuleList(
            Block(
                dim=dim,
                num_heads=num_heads,
                mlp_ratio=mlp_ratio,
                qk_norm_full=qk_norm_full,
                cross_norm=cross_norm,
                activation=activation,
                selective=recompute == "selective",
            )
            for _ in range(depth)
        )
        self.modulation = nn.Parameter(torch.zeros(2, dim))
        self.head = nn.Linear(dim, width)
        self.sharing: Sharing | None = None
        self._initialize()

    def _initialize(self) -> None:
        for child in self.children():
            if child is not self.blocks:  # they have initialized themselves, and perhaps have been cut up since
                initialize(child)
        for layer in (self.condition, self.head, self.embed_flags):
            nn.init.zeros_(layer.weight)
        for linear in (self.embed_sigma[0], self.embed_sigma[2]):
            nn.init.normal_(linear.weight, std=0.02)  # type: ignore[arg-type]
        if self.embed_pooled is not None:
            nn.init.normal_(self.embed_pooled.weight, std=0.02)
        for parameter in (self.modulation, self.embed_flags.weight, self.head.weight):
            parameter.no_muon = True  # type: ignore[attr-defined]

    def forward(self, tokens: Tokens, text_ME: Tensor, text_packing: Packing) -> Tensor:
        """Return the prediction for each token `[N, (pt ph pw C)]`.

        Args:
            tokens: the pack.
            text_ME: text features of all clips, in the clips' order.
            text_packing: text tokens of each clip.
        """
        clips = len(tokens.packing)
        assert len(text_packing) == clips, f"{len(text_packing)} texts for {clips} clips"
        sigma_RD = self._embed_condition(tokens, text_ME, text_packing)
        if self.sharing is not None:
            tokens, text_ME, text_packing, sigma_RD = self.sharing.part_of(tokens, text_ME, text_packing, sigma_RD)
        packing = tokens.packing
        rotation = rotations(tokens.coords, self.axes)
        spread = Spread.of(tokens, self.dim)
        with torch.autocast(sigma_RD.device.type, enabled=False):
            condition_R6D = self.condition(F.silu(sigma_RD)).float().unflatten(-1, (6, -1))
        text_MD = self.embed_text(text_ME)
        x_ND = self.embed(tokens.values.to(self.embed.weight.dtype))
        x_ND = x_ND + self.embed_flags(tokens.flags).to(x_ND.dtype)
        for block in self.blocks:
            run = partial(again, block) if self.recompute == "full" and torch.is_grad_enabled() else block
            x_ND = run(x_ND, condition_R6D, text_MD, spread, packing, text_packing, rotation)
        shift_RD, scale_RD = (sigma_RD.float()[:, None] + self.modulation).unbind(1)
        out_NP = self.head(spread.norm(x_ND, shift_RD, scale_RD))
        return out_NP if self.sharing is None else self.sharing.whole(out_NP, packing)

    def _embed_condition(self, tokens: Tokens, text_ME: Tensor, text_packing: Packing) -> Tensor:
        """Return each row's condition `[R, D]`: its noise level and perhaps its clip's mean text; never autocast."""
        with torch.autocast(text_ME.device.type, enabled=False):
            dtype = self.condition.weight.dtype
            sigma_RD = self.embed_sigma(sinusoid(tokens.sigma).to(dtype))
            if self.embed_pooled is not None:
                pooled_BD = self.embed_pooled(text_packing.mean(text_ME).to(dtype))
                sigma_RD = sigma_RD + pooled_BD.index_select(0, tokens.row_clips)
            return sigma_RD
