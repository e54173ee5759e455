"""What a clip costs a DiT: the positions of its latent, and the layers that each token goes through."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.models.patchify import STRIDE
from soratrain.models.published import Published


def each_token(dit: nn.Module) -> list[nn.Linear]:
    """Return the layers of a DiT that every token goes through; the others see text or a clip's noise level."""
    others = ("embed_text", "embed_sigma", "embed_pooled", "condition")
    return [
        layer
        for name, layer in dit.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(others) and not name.endswith("cross.kv")
    ]


def stride_of(vae: partial) -> Sequence[int]:
    """Return the stride of a VAE's factory; of another's, whose config lies with its weights, that of the published."""
    kind: Any = vae.func
    if issubclass(kind, Published):
        return kind.strides.get(vae.keywords["latent_channels"], STRIDE)
    with torch.device("meta"):
        return vae().stride


def positions(bucket: Bucket, stride: Sequence[int]) -> tuple[int, int, int]:
    """Return frames, height and width of a bucket's latent."""
    return 1 + (bucket.frames - 1) // stride[0], bucket.height // stride[1], bucket.width // stride[2]
