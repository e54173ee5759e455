"""What a clip costs a DiT: its tokens, and the layers that each of them goes through."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.data.fitting import TIME


def each_token(dit: nn.Module) -> list[nn.Linear]:
    """Return the layers of a DiT that every token goes through; the others see text or a clip's noise level."""
    others = ("embed_text", "embed_sigma", "embed_pooled", "condition")
    return [
        layer
        for name, layer in dit.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(others) and not name.endswith("cross.kv")
    ]


def tokens_of(bucket: Bucket, patch: Sequence[int]) -> int:
    """Return a DiT's tokens for one clip of a bucket."""
    t, h, w = 1 + (bucket.frames - 1) // TIME, bucket.height // 8, bucket.width // 8
    return -(-t // patch[0]) * (h // patch[1]) * (w // patch[2])
