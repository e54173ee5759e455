"""What a clip costs a DiT, the positions of its latent and the layers that its tokens go through; and how equally."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.data.fitting import GRID
from soratrain.data.plan import Plan
from soratrain.errors import ConfigError
from soratrain.models.patchify import STRIDE
from soratrain.models.published import Published

BALANCED_OVER = 64  # steps over which the balance of the ranks is worked out


def each_token(dit: nn.Module) -> list[nn.Linear]:
    """Return the layers of a DiT that every token goes through; the others see text or a clip's noise level."""
    others = ("embed_text", "embed_sigma", "embed_pooled", "condition")
    return [
        layer
        for name, layer in dit.named_modules()
        if isinstance(layer, nn.Linear) and not name.startswith(others) and not name.endswith("cross.kv")
    ]


def forward_flops(dit: nn.Module, lengths: Sequence[int], texts: Sequence[int] = ()) -> tuple[int, int]:
    """Return the operations of a DiT's forward pass over a pack, and how many of them are attention's.

    Two for each weight and token that meet, four for each width and pair of query and key: pairs within a clip only,
    the sum of squares and not the square of the sum. Norms, what clips (and not tokens) go through, padding and what is
    computed twice do not count. Training takes three times as many.

    Args:
        dit: the net, perhaps on meta.
        lengths: tokens of each clip.
        texts: tokens of each clip's text; left out, text counts for nothing.
    """
    dim, depth = cast(int, dit.dim), cast(int, dit.depth)
    linear = sum(lengths) * sum(layer.weight.numel() for layer in each_token(dit))
    text = (layer for name, layer in dit.named_modules() if name.startswith("embed_text") or name.endswith("cross.kv"))
    linear += sum(texts) * sum(layer.weight.numel() for layer in text if isinstance(layer, nn.Linear))
    pairs = sum(length**2 for length in lengths)
    pairs += sum(length * words for length, words in zip(lengths, texts, strict=True)) if texts else 0
    return 2 * linear + 4 * depth * dim * pairs, 4 * depth * dim * pairs


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


def parse_clip(text: str) -> tuple[int, int, int]:
    """Return (height, width, frames) of `WIDTHxHEIGHTxFRAMES`. Raises ConfigError for anything else."""
    match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", str(text))
    if not match or min(map(int, match.groups())) < 1 or min(int(match[1]), int(match[2])) < GRID:
        raise ConfigError(f"stage.job.clip={text} is not WIDTHxHEIGHTxFRAMES; a minute of 1080p is 1920x1080x1440")
    return int(match[2]), int(match[1]), int(match[3])


def balance(plan: Plan, ranks: int) -> dict[str, float]:
    """Return how equally ranks work in the plan's own micro-batches: mean by largest cost, its least and its mean."""
    found = []
    for index in range(BALANCED_OVER * plan.per_rank(ranks)):
        costs = []
        for rank in range(ranks):
            micro = plan.local(index, rank, ranks)
            costs.append(sum(plan.budget.cost(plan.assignment.buckets[bucket]) for bucket in micro.buckets))
        found.append(sum(costs) / len(costs) / max(costs))
    return {"least": min(found), "mean": sum(found) / len(found), "micro_steps": float(len(found))}
