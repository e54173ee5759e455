"""Products of a few rows with large matrices on a CPU, where the time goes to reading the matrices.

torch multiplies by a matrix as it lies in memory, and reads it then at about a third of what the memory gives. In the
order that oneDNN wants, in which torch.compile's inductor keeps frozen matrices as well, it is read twice as fast.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Weights of a matrix for which the order pays; measured: with 8 rows 256 x 256 loses a little, 384 x 384 wins.
LEAST = 2**17


class Ordered:
    """Linear layers whose weights stay as they are; a copy in order is made when one is asked for first."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.found: dict[nn.Linear, Tensor | None] = {}

    def __call__(self, x: Tensor, layer: nn.Linear) -> Tensor:
        """Return what `layer(x)` returns, up to rounding; nothing can be trained through it."""
        if layer not in self.found:
            pays = layer.weight.numel() >= LEAST and can(x, layer.weight)
            self.found[layer] = torch.ops.mkldnn._reorder_linear_weight(layer.weight, self.rows) if pays else None
        if (weight := self.found[layer]) is None:
            return F.linear(x, layer.weight, layer.bias)
        return torch.ops.mkldnn._linear_pointwise.default(x, weight, layer.bias, "none", [], "")


def can(x: Tensor, weight: Tensor) -> bool:
    """Return whether oneDNN takes such a product here; its operators are missing from torch for some processors."""
    there = torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
    there = there and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not there or weight.device.type != "cpu" or x.dtype != weight.dtype or torch.is_autocast_enabled("cpu"):
        return False
    bf16 = weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return bf16 or weight.dtype == torch.float32
