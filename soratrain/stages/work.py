"""What a training step of the DiT has computed: the operations that its clips needed, and the positions beyond them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn

from soratrain.stages.plan_cost import forward_flops

TRAINING = 3  # a backward pass takes twice what the forward takes: a product each for inputs and weights


class TrainingFlops:
    """Counts the operations of training a DiT on a pack, as `forward_flops` does, in a microsecond.

    They are linear in three sums, whose factors are taken once from a net without memory, which no strategy cuts up.

    Args:
        factory: of the DiT.
    """

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            net = factory()
        alone, self.pair = forward_flops(net, [1])
        told, pairs = forward_flops(net, [1], [1])
        self.token = alone - self.pair
        self.text = told - pairs - self.token

    def __call__(self, lengths: Sequence[int], texts: Sequence[int]) -> int:
        """Return the operations of a step on clips of `lengths` tokens, with texts of so many."""
        pairs = sum(length * (length + words) for length, words in zip(lengths, texts, strict=True))
        return TRAINING * (self.token * sum(lengths) + self.text * sum(texts) + self.pair * pairs)
