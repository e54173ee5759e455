"""Ulysses sequence parallelism: the ranks of a group share the tokens of each pack (Jacobs et al., 2023).

A rank holds N/k tokens and does everything with them that tokens do alone. Around self-attention the ranks exchange:
each gets the queries, keys and values of all tokens for H/k heads, in one all-to-all, and gives back their result in
another. Cross-attention needs none, since every rank has the texts. To whoever calls the DiT nothing of it shows: all
ranks of a group pass the same pack in, and each gets the prediction for all of it.

Gradients: each rank of a group has the part of every parameter's that comes from its own tokens. What is wanted is
their sum, while DDP and ZeRO average over all ranks alike, so the gradient of the prediction is multiplied by k on its
way back. The mean over all ranks is then that of a single process, for clipping and norms too, and ZeRO shards over
all ranks.

Legend: N tokens of the pack, n of one rank, k ranks of a group, H heads, K head dim, M text tokens, R rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from soratrain.distributed.mesh import Mesh, check_heads
from soratrain.models.attention import Packing, attend
from soratrain.models.dit import Block, DiT
from soratrain.models.tokens import Tokens


@dataclass(frozen=True)
class Part(Packing):
    """Which tokens of each clip are one rank's; padding counts to the last clip.

    Attributes:
        whole: all tokens of the pack.
    """

    whole: Packing


def group_of(mesh: Mesh, timeout: timedelta | None = None, backend: str | None = None) -> Any:
    """Return a process group of this rank's group; collective over all ranks, of which each calls it as often."""
    firsts = range(0, mesh.size, mesh.sequence)
    groups = [
        dist.new_group(list(range(first, first + mesh.sequence)), timeout=timeout, backend=backend) for first in firsts
    ]
    return groups[mesh.data_rank]


class Ulysses:
    """One rank's side of a group that shares packs.

    Args:
        group: of the ranks; all of them make the same calls.
        place: this rank's number in it.
        size: ranks in it, k.
    """

    def __init__(self, group: Any, place: int, size: int) -> None:
        self.group, self.place, self.size = group, place, size

    @classmethod
    def joined(cls, mesh: Mesh, timeout: timedelta | None = None, backend: str | None = None) -> Ulysses:
        """Return this rank's side; collective over all ranks, of which each calls it once."""
        return cls(group_of(mesh, timeout, backend), mesh.place, mesh.sequence)

    def any(self, flag: bool, device: torch.device) -> bool:
        """Return whether `flag` is true on any rank of the group; `device` is one on which the group can exchange."""
        flags = torch.tensor([float(flag)], device=device)
        dist.all_reduce(flags, group=self.group)
        return bool(flags > 0)

    def part_of(
        self, tokens: Tokens, text_ME: Tensor, text_packing: Packing, sigma_RD: Tensor
    ) -> tuple[Tokens, Tensor, Packing, Tensor]:
        """Return this rank's tokens of a pack, the texts and the rows that they belong to.

        All ranks have equally many, the last perhaps up to k - 1 in all that are padding: zeros, in the last clip. They
        are left out of self-attention and of the prediction, so nothing of them reaches a result or a gradient.
        """
        whole = tokens.packing
        each = -(-whole.total // self.size)
        start, end = (min(whole.total, place * each) for place in (self.place, self.place + 1))
        padding = each - (end - start)
        ends = list(accumulate(whole.lengths))
        owned = [min(stop, end) - max(stop - length, start) for stop, length in zip(ends, whole.lengths, strict=True)]
        clips = [clip for clip, count in enumerate(owned) if count > 0] or [len(whole) - 1]
        first, last = clips[0], clips[-1] + 1
        lengths = [max(0, owned[clip]) for clip in clips]
        lengths[-1] += padding

        def own(values: Tensor) -> Tensor:
            return F.pad(values[start:end], (*[0] * (2 * (values.ndim - 1)), 0, padding))

        texts = Packing(text_packing.lengths[first:last])
        before = sum(text_packing.lengths[:first])
        rows = tokens.rows
        if rows is None:
            sigma_RD = sigma_RD[first:last]
        else:
            rows = torch.cat((rows[start:end], rows[-1:].expand(padding)))
        part = replace(
            tokens,
            values=own(tokens.values),
            coords=own(tokens.coords),
            flags=own(tokens.flags),
            packing=Part(tuple(lengths), whole),
            rows=rows,
        )
        return part, text_ME[before : before + texts.total], texts, sigma_RD

    def attend(self, q_nHK: Tensor, k_nHK: Tensor, v_nHK: Tensor, q: Packing, k: Packing) -> Tensor:
        """Return softmax attention of this rank's queries over all tokens of their clips, `[n, H, K]`."""
        assert isinstance(q, Part) and q is k, "self-attention of a part of a pack"
        sent = torch.stack([x.unflatten(1, (self.size, -1)).transpose(0, 1) for x in (q_nHK, k_nHK, v_nHK)], dim=2)
        q_NhK, k_NhK, v_NhK = exchange(sent, self.group).flatten(0, 1)[: q.whole.total].unbind(1)
        out_NhK = attend(q_NhK, k_NhK, v_NhK, q.whole, q.whole)
        out_NhK = F.pad(out_NhK, (0, 0, 0, 0, 0, self.size * q.total - q.whole.total))
        return exchange(out_NhK.unflatten(0, (self.size, -1)), self.group).movedim(0, 1).flatten(1, 2)

    def whole(self, x_nP: Tensor, packing: Packing) -> Tensor:
        """Return all ranks' tokens `[N, P]`; their gradient, the same on all, goes back to each rank's own, k times."""
        assert isinstance(packing, Part)
        gathered: Tensor = _Whole.apply(x_nP, self)  # type: ignore[no-untyped-call]
        return gathered[: packing.whole.total]


def exchange(x: Tensor, group: Any) -> Tensor:
    """Return `[k, ...]`, of which number j is what rank j has sent, from what is sent to each rank, alike."""
    return _Exchange.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def _all_to_all(x: Tensor, group: Any) -> Tensor:
    x = x.contiguous()
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x, group=group)
    return out


class _Exchange(torch.autograd.Function):
    """One all-to-all; its transpose is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(x, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return _all_to_all(grad, ctx.group), None


class _Whole(torch.autograd.Function):
    """Gathers parts; see `Ulysses.whole`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ulysses: Ulysses) -> Tensor:
        ctx.ulysses = ulysses
        out = x.new_empty(ulysses.size * len(x), *x.shape[1:])
        dist.all_gather(list(out.chunk(ulysses.size)), x.contiguous(), group=ulysses.group)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ulysses = ctx.ulysses
        return grad.chunk(ulysses.size)[ulysses.place] * ulysses.size, None


def share(net: nn.Module, ulysses: Ulysses) -> None:
    """Let every DiT in `net` share its packs with the ranks of a group from now on.

    Raises:
        ConfigError: heads cannot be dealt out evenly.
    """
    for dit in net.modules():
        if not isinstance(dit, DiT):
            continue
        check_heads(ulysses.size, dit.num_heads, "the DiT")
        dit.sharing = ulysses
        for block in dit.blocks:
            assert isinstance(block, Block)
            block.attention.attend = ulysses.attend
