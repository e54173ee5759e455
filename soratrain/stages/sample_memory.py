"""How much memory a forward of the net takes, before the first: how many clips fit, or the largest that does."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from soratrain.amounts import memory
from soratrain.distributed.memory import FP32, dit_activations, most_tokens
from soratrain.errors import ConfigError
from soratrain.models.dit import Block, DiT

SPARE = 0.9  # of what is free


def most_at_once(
    dit: DiT,
    positions: int,
    *,
    guided: bool,
    half: bool,
    free: int,
    size: Sequence[int],
    unit: Sequence[int],
    sequence: int = 1,
) -> int:
    """Return how many clips of so many latent positions, given and drawn, can go through the net at once.

    Args:
        guided: whether each goes twice, with and without its prompt.
        half: whether the net runs in 16 bits.
        free: bytes.
        size: height and width.
        unit: their multiples.
        sequence: ranks that share the tokens, each with memory of its own.

    Raises:
        ConfigError: not one; names the largest size of that shape that fits.
    """
    block, tokens, times = dit.blocks[0], positions // dit.patch_size, 2 if guided else 1
    assert isinstance(block, Block)
    ratio = block.up.out_features / dit.dim
    net: dict[str, Any] = {"dim": dit.dim, "depth": dit.depth, "mlp_ratio": ratio, "training": False}
    net["shared"] = sequence > 1
    net["itemsize"] = FP32 // 2 if half else FP32
    fit = sequence * most_tokens(int(SPARE * free), **net) // times
    if fit >= tokens:
        return fit // tokens
    smaller = math.sqrt(fit / tokens)
    height, width = (int(side * smaller) // step * step for side, step in zip(size, unit, strict=True))
    mend = f"the largest size that fits is about {width}x{height}" if height and width else "no size fits"
    taken = dit_activations(tokens=-(-times * tokens // sequence), **net)
    raise ConfigError(
        f"size={size[1]}x{size[0]}: {tokens:,} tokens at once take about {memory(taken)}, and {memory(free)} are free;"
        f" {mend}; or draw fewer frames"
    )
