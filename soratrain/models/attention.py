"""Attention over flat, ragged tokens: one function, and the packing that says where each segment begins.

Legend: N query tokens of the pack, M key tokens, B segments, L longest segment, H heads, K head dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._ops import OpOverload

# On CPU in bf16, SDPA's backward is slower than matmul and softmax on short sequences (80 x 32, 32 x 6 heads: 25 ms
# against 4 ms; 320 tokens: 35 against 26) and faster on long ones (1,024 tokens: 91 against 184). In fp32 SDPA wins.
MATMUL_MAX_SCORES = 512 * 512
# Segments of unequal length are padded to the longest, rather than taken one by one, while that costs no more than this
# many scores per segment: below it a Python loop's overhead is larger than the padding's. One thread, forwards and
# backwards, lengths from a quarter of the longest: in fp32, where a mask is dear, padding takes 0.8 times as long at
# 1,024 scores and 1.6 times at 4,096; in bf16 with matmul and softmax 0.8 times at 11,236 and 1.5 times at 45,369.
PAD_MAX_SCORES, PAD_MAX_SCORES_FP32 = 128 * 128, 32 * 32


@dataclass(frozen=True)
class Packing:
    """Where the segments of a flat `[N, ...]` tensor begin and end.

    Lengths live on the host, so that choosing a back end or a largest length never waits for a device.

    Attributes:
        lengths: tokens of each segment, all at least 1.
    """

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        assert self.lengths and min(self.lengths) > 0, f"a packing needs segments of at least one token: {self.lengths}"

    @classmethod
    def of(cls, lengths: Sequence[int]) -> Packing:
        """Return the packing of `lengths`."""
        return cls(tuple(int(length) for length in lengths))

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def total(self) -> int:
        """All tokens, N."""
        return sum(self.lengths)

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest segment, L."""
        return max(self.lengths)

    @cached_property
    def equal(self) -> bool:
        """Whether all segments are equally long, so that a pack is a plain batch."""
        return self.total == self.longest * len(self.lengths)

    @cached_property
    def _tensors(self) -> dict[tuple[str, str], Tensor]:
        return {}

    def _on(self, name: str, device: torch.device, values: Sequence[int], dtype: torch.dtype) -> Tensor:
        key = (name, str(device))
        if key not in self._tensors:
            self._tensors[key] = torch.tensor(values, dtype=dtype, device=device)
        return self._tensors[key]

    def cu_seqlens(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the segments' borders `[B + 1]`, int32: 0, n1, n1 + n2, ..."""
        return self._on("cu", torch.device(device), list(accumulate(self.lengths, initial=0)), torch.int32)

    def owner(self, device: torch.device | str = "cpu") -> Tensor:
        """Return the segment of each token `[N]`, int64."""
        owners = [index for index, length in enumerate(self.lengths) for _ in range(length)]
        return self._on("owner", torch.device(device), owners, torch.int64)

    def slots(self, device: torch.device | str = "cpu") -> Tensor:
        """Return each token's place in the padded `[B * L]` layout, `[N]`, int64."""
        places = [index * self.longest + place for index, length in enumerate(self.lengths) for place in range(length)]
        return self._on("slots", torch.device(device), places, torch.int64)

    def mask(self, device: torch.device | str = "cpu") -> Tensor:
        """Return which places of the padded `[B, L]` layout hold a token, bool."""
        columns = torch.arange(self.longest, device=device)
        return columns[None] < self._on("lengths", torch.device(device), self.lengths, torch.int64)[:, None]

    def pad(self, x_N: Tensor) -> Tensor:
        """Return `[N, ...]` as `[B, L, ...]`, zeros where a segment is shorter than L."""
        shape = (len(self), self.longest, *x_N.shape[1:])
        if self.equal:
            return x_N.reshape(shape)
        padded = x_N.new_zeros(shape[0] * shape[1], *x_N.shape[1:])
        return padded.index_copy(0, self.slots(x_N.device), x_N).reshape(shape)

    def unpad(self, x_BL: Tensor) -> Tensor:
        """Return `[B, L, ...]` as `[N, ...]`, the padding left out."""
        flat = x_BL.reshape(-1, *x_BL.shape[2:])
        return flat if self.equal else flat.index_select(0, self.slots(x_BL.device))

    def expand(self, x_B: Tensor) -> Tensor:
        """Return each segment's row of `[B, ...]` at each of its tokens, `[N, ...]`."""
        return x_B.index_select(0, self.owner(x_B.device))

    def mean(self, x_N: Tensor) -> Tensor:
        """Return the mean over each segment's tokens, `[B, ...]`, in fp32."""
        if self.equal:
            return self.pad(x_N).float().mean(1)
        totals = x_N.new_zeros(len(self), *x_N.shape[1:], dtype=torch.float32)
        totals = totals.index_add(0, self.owner(x_N.device), x_N.float())
        lengths = self._on("lengths", x_N.device, self.lengths, torch.int64)
        return totals / lengths.view(-1, *[1] * (x_N.ndim - 1))


def attend(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, q: Packing, k: Packing, *, backend: str = "auto") -> Tensor:
    """Return softmax attention of each query over the keys of its own segment, `[N, H, K]`.

    Args:
        q_NHK: queries, packed as `q` says.
        k_MHK: keys, packed as `k` says; segment i of `k` is what segment i of `q` looks at.
        v_MHK: values, packed like the keys.
        backend: `auto`, or one of `varlen` (CUDA, bf16 or fp16), `dense` (padded where lengths differ), `loop`.
    """
    assert len(q) == len(k), f"{len(q)} query segments against {len(k)} key segments"
    if backend == "auto":
        backend = choose(q_NHK, q, k)
    if backend == "varlen":
        return _varlen(q_NHK, k_MHK, v_MHK, q, k)
    if backend == "dense":
        return _dense(q_NHK, k_MHK, v_MHK, q, k)
    assert backend == "loop", f"no attention back end {backend!r}"
    return _loop(q_NHK, k_MHK, v_MHK, q, k)


def choose(q_NHK: Tensor, q: Packing, k: Packing) -> str:
    """Return the back end that `auto` means for these tokens."""
    if q.equal and k.equal:
        return "dense"
    if q_NHK.is_cuda and q_NHK.dtype in (torch.bfloat16, torch.float16):
        return "varlen"
    most = PAD_MAX_SCORES_FP32 if q_NHK.dtype == torch.float32 else PAD_MAX_SCORES
    return "dense" if q.longest * k.longest <= most else "loop"


@lru_cache(maxsize=1)
def attention_ops() -> tuple[OpOverload, ...]:
    """Return the operations that may do the work of `attend`, on any device."""
    import torch.nn.attention.varlen  # noqa: F401  registers its own

    names = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
    found = [getattr(torch.ops.aten, f"_scaled_dot_product_{name}").default for name in names]
    return (*found, torch.ops.torch_attn._varlen_attn.default)


def _varlen(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, q: Packing, k: Packing) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    device = q_NHK.device
    out = varlen_attn(q_NHK, k_MHK, v_MHK, q.cu_seqlens(device), k.cu_seqlens(device), q.longest, k.longest)
    assert isinstance(out, Tensor)
    return out


def _dense(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, q: Packing, k: Packing) -> Tensor:
    q_BHLK = q.pad(q_NHK).transpose(1, 2)
    k_BHLK, v_BHLK = k.pad(k_MHK).transpose(1, 2), k.pad(v_MHK).transpose(1, 2)
    mask = None if k.equal else k.mask(q_NHK.device)[:, None, None]
    return q.unpad(_attend_batch(q_BHLK, k_BHLK, v_BHLK, mask).transpose(1, 2))


def _loop(q_NHK: Tensor, k_MHK: Tensor, v_MHK: Tensor, q: Packing, k: Packing) -> Tensor:
    parts = zip(q_NHK.split(q.lengths), k_MHK.split(k.lengths), v_MHK.split(k.lengths), strict=True)
    heads = ([x.transpose(0, 1)[None] for x in part] for part in parts)
    return torch.cat([_attend_batch(q, k, v, None)[0].transpose(0, 1) for q, k, v in heads])


def _attend_batch(q_BHLK: Tensor, k_BHMK: Tensor, v_BHMK: Tensor, mask: Tensor | None) -> Tensor:
    """Attend within a plain batch; `mask` `[B, 1, 1, M]` is true where a key may be seen."""
    scores = q_BHLK.shape[-2] * k_BHMK.shape[-2]
    if q_BHLK.is_cuda or q_BHLK.dtype == torch.float32 or scores > MATMUL_MAX_SCORES:
        return F.scaled_dot_product_attention(q_BHLK, k_BHMK, v_BHMK, attn_mask=mask)
    weights = (q_BHLK * (1 / math.sqrt(q_BHLK.shape[-1]))) @ k_BHMK.transpose(-1, -2)
    if mask is not None:
        weights = weights.masked_fill(~mask, float("-inf"))
    return weights.softmax(-1).to(v_BHMK.dtype) @ v_BHMK
