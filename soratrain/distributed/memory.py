"""How much memory activations will need. Estimates, said to be so.

What a forward pass keeps for the backward one is counted from the net's shape (DiT), or measured on a small clip and
scaled by its pixels, since every operation of the VAE is local. What is kept of the weights is in `components.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

FP32 = 4
GIB = 2**30


def dit_activations(
    *,
    tokens: int,
    dim: int,
    depth: int,
    mlp_ratio: float,
    itemsize: int,
    recompute: str = "none",
    shared: bool = False,
    training: bool = True,
) -> int:
    """Return the bytes that a DiT holds at its peak beside weights and their gradients, for all tokens of a pack.

    Counted in widths of a token. Each block keeps 17 and twice its MLP's (input, norm, q, k, v, q and k turned, result
    and product of attention, the same across, the MLP's input, hidden, activated and result); with `selective` 12
    (products and attention, but for the MLP's hidden); with `full` its input. Beside them: what one block computes
    again, the gradients that pass through it, and 4 before and after the blocks. In 16 bits one more of each block is
    fp32 (what a GPU's norm before cross-attention keeps), and four where one works (queries and keys, normed and
    turned). Where ranks share the tokens, each block keeps two more: v and attention's result, as they were received. A
    forward alone holds most around attention, or the stream, its norm and twice the MLP's own. Text, noise levels and
    what a back end keeps for itself are left out, and so is, with blocks compiled, what the compiler need not keep.

    Args:
        tokens: of all clips; where ranks share them, of one rank.
        dim, depth, mlp_ratio, recompute: as the DiT has them.
        itemsize: bytes of a number: 4, or 2 under bf16.
        shared: whether ranks share the tokens.
        training: whether there is a backward pass; else only what one block holds at once counts.
    """
    block, hidden = 17 + 2 * mlp_ratio + (2 if shared else 0), mlp_ratio
    wide = FP32 if itemsize < FP32 else 0
    if not training:
        return int(tokens * dim * max(3 + 2 * hidden, (19 if wide else 10) + (3 if shared else 0)) * itemsize)
    each = {"none": block, "selective": 12, "full": 1}[recompute]
    again = {"none": 0, "selective": 1 + 2 * hidden, "full": block}[recompute]
    blocks = depth if recompute == "none" else 1
    return int(tokens * dim * ((depth * each + again + 2 + hidden + 4) * itemsize + (blocks + 4) * wide))


def most_tokens(budget: int, **net: Any) -> int:
    """Return how many tokens fit into `budget` bytes of activations; `net` is what else `dit_activations` takes."""
    many = 1 << 20
    return budget * many // dit_activations(tokens=many, **net)


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
