"""A captioner that is small enough for tests, and clips for it."""

from __future__ import annotations

import torch

from soratrain.models.captioner import Captioner


def captioner(**changes) -> Captioner:
    torch.manual_seed(0)
    sizes = dict(dim=24, depth=2, num_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2, queries=3, table=64)
    net = Captioner(**(sizes | dict(text_dim=16, vector_dim=8, max_bytes=24, patch=(2, 8, 8)) | changes)).eval()
    for param in net.parameters():  # zero-initialised layers would hide what a test is after
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.3)
    return net


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
