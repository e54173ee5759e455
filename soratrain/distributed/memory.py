"""How much memory a rank will need, by component, before anything is started. Estimates, said to be so.

What is kept of the weights is exact arithmetic (Rajbhandari et al., 2020, section 3.1, for fp32 weights under
autocast): 4 bytes a parameter each for weights, gradients, both moments of AdamW and the average; ZeRO divides by the
ranks what its stage shards. What a forward pass keeps for the backward one is counted from the net's shape (DiT), or
measured on a small clip and scaled by its pixels, since every operation of the VAE is local.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

FP32 = 4
GIB = 2**30


@dataclass(frozen=True)
class Kept:
    """Bytes that one rank holds."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int | None = None  # None where nothing is known of them

    @property
    def total(self) -> int:
        """Return all of it that is known."""
        return self.weights + self.gradients + self.optimizer + self.average + (self.activations or 0)


def kept(
    parameters: int, *, zero: int, ranks: int, moments: int, average: bool, activations: int | None = None
) -> Kept:
    """Return what a rank holds.

    Args:
        parameters: trained numbers.
        zero: ZeRO stage, 0 for none: 1 shards moments and average, 2 also gradients, 3 also weights.
        ranks: data-parallel ranks.
        moments: numbers that the optimizer keeps for each parameter: 2 for AdamW, 1 for Muon.
        average: whether weights are averaged.
        activations: bytes of the largest micro-batch.
    """

    def share(stage: int) -> int:
        return -(-parameters // ranks) * FP32 if zero >= stage else parameters * FP32

    return Kept(share(3), share(2), moments * share(1), share(1) if average else 0, activations)


def dit_activations(*, tokens: int, dim: int, depth: int, mlp_ratio: float, itemsize: int) -> int:
    """Return the bytes that a DiT keeps for its backward pass, without activation checkpointing.

    Of each block and token, in widths: 10 around self-attention (input, norm, modulated, q, k, v, q and k normalised,
    the result twice), 4 for the rotation in fp32, 6 around cross-attention, 4 around the MLP and twice its own width.
    """
    widths = 20 + 2 * mlp_ratio
    return int(tokens * depth * dim * (widths * itemsize + 4 * FP32))


def measured_activations(net: nn.Module, example: Tensor) -> float:
    """Return the bytes that a forward pass of `net` keeps for the backward one, per number in `example`.

    Each storage counts once; weights do not count.
    """
    own = {parameter.untyped_storage().data_ptr() for parameter in net.parameters()}
    seen: dict[int, int] = {}
    alive: list[Tensor] = []  # or a freed storage's address would be counted as another's

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        net(example)
    return sum(seen.values()) / example.numel()
