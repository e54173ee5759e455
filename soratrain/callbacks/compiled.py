"""Compiles the DiT's blocks from outside: the net knows nothing of it, and names in checkpoints and weights stay."""

from __future__ import annotations

import lightning as L
import torch
from torch import nn

from soratrain.models.dit import Block, DiT


def compile_blocks(net: nn.Module) -> int:
    """Let each block of every DiT in `net` run compiled from now on; return how many.

    Block by block, since they are alike: one is compiled and all use it. Sizes are dynamic, or each bucket and each
    pack would be compiled for itself. What attention does with lengths on the host stays outside.
    """
    blocks = [block for module in net.modules() if isinstance(module, DiT) for block in module.blocks]
    for block in blocks:
        assert isinstance(block, Block)
        for layer in (block.attention, block.cross):
            layer.attend = torch.compiler.disable(layer.attend)
        block.compile(dynamic=True)
    return len(blocks)


class CompileBlocks(L.Callback):
    """Compiles the blocks once the strategy has the nets in place."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        compile_blocks(pl_module)
