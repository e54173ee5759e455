"""Counts what a DiT's block does, forwards and backwards: operations, and the bytes that those read and write which are
no product nor attention. The same operations run on any device, but for attention itself."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed.memory import dit_activations
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

PRODUCTS = ("mm", "attention")  # parts of their names
WRITTEN = ("copy_", "zero_", "fill_")  # their first argument is not read
IDLE = ("_unsafe_view", "detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
CLIPS = (4, 32, 32), (8, 32, 32)  # latents: what grows from one to the other is of tokens, and not of weights
DIM, HEADS, RATIO, TEXT, CHANNELS = 256, 4, 4.0, 16, 4


class Counted(TorchDispatchMode):
    """Counts operations that make or change numbers, not views of them."""

    def __init__(self) -> None:
        super().__init__()
        self.operations, self.bytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if not made or func.is_view or name in IDLE:
            return out
        self.operations += 1
        if not any(part in name for part in PRODUCTS):
            read = tensors[1:] if name in WRITTEN else tensors
            self.bytes += sum(spread(tensor) for tensor in (*read, *made))
        return out


def spread(tensor: Tensor) -> int:
    """Return the bytes that a pass over a tensor moves: what is expanded is read once."""
    sizes = [size for size, step in zip(tensor.shape, tensor.stride(), strict=True) if step]
    return torch.Size(sizes).numel() * tensor.element_size()


@dataclass(frozen=True)
class Found:
    """What a pass counts to: operations, and bytes moved, each forwards and in all; bytes that it is said to keep."""

    first: int
    operations: int
    forwards: int
    moved: int
    kept: int


@cache
def pass_over(depth: int, clip: tuple[int, int, int], half: bool, recompute: str) -> Found:
    """Return what a pass, forwards and backwards, through so many blocks counts to."""
    net = DiT(
        channels=CHANNELS,
        dim=DIM,
        depth=depth,
        num_heads=HEADS,
        text_dim=TEXT,
        mlp_ratio=RATIO,
        recompute=recompute,
    )
    segment = Segment(torch.randn(CHANNELS, *clip), torch.tensor(0.5), 8.0)
    tokens, text = flatten([[segment]], net.patch).tokens, torch.randn(3, TEXT)
    with Counted() as counted:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = net(tokens, text, Packing.of([3]))
        first, forwards = counted.operations, counted.bytes
        out.float().square().mean().backward()
    kept = dit_activations(tokens=len(tokens.values), dim=DIM, depth=depth, mlp_ratio=RATIO, itemsize=2 if half else 4)
    return Found(first, counted.operations, forwards, counted.bytes, kept)


def operations(*, half: bool, recompute: str = "none", clip: tuple[int, int, int] = CLIPS[0]) -> tuple[int, int]:
    """Return a block's operations, forwards and in all."""
    less, more = (pass_over(depth, clip, half, recompute) for depth in (1, 2))
    return more.first - less.first, more.operations - less.operations


def passes(*, half: bool) -> tuple[float, float]:
    """Return the passes over what a block keeps that memory sees, forwards and in all."""
    found = {(depth, clip): pass_over(depth, clip, half, "none") for depth in (1, 2) for clip in CLIPS}

    def grown(name: str) -> int:
        less, more = (getattr(found[2, clip], name) - getattr(found[1, clip], name) for clip in CLIPS)
        return more - less

    return grown("forwards") / grown("kept"), grown("moved") / grown("kept")
