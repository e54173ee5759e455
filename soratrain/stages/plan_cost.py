"""What a run shows and stores, what a clip costs a DiT, and how equally ranks work."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.data.fitting import GRID, TIME
from soratrain.data.plan import Plan
from soratrain.distributed.memory import GIB
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


def run_figures(plan: Plan, steps: int) -> dict[str, float]:
    """Return steps, epochs, samples and tokens of a whole run."""
    each = [plan.accumulate_blocks * count for count in plan.blocks.expected]
    samples = sum(each)
    tokens = sum(count * bucket.tokens for count, bucket in zip(each, plan.assignment.buckets, strict=True))
    return {
        "steps": steps,
        "samples_per_step": samples,
        "tokens_per_step": tokens,
        "epochs": samples * steps / sum(plan.assignment.rates),
        "tokens": tokens * steps,
    }


def latent(bucket: Bucket, vae: partial) -> int:
    """Return the numbers in the latent of one clip of a bucket."""
    return vae.keywords["latent_channels"] * math.prod(positions(bucket, stride_of(vae)))  # type: ignore[no-any-return]


def cache_size(plan: Plan, vae: partial) -> dict[str, Any]:
    """Return the size of all cached latents in bf16."""
    each = zip(plan.assignment.buckets, plan.assignment.members, strict=True)
    latents = sum(len(members) * latent(bucket, vae) for bucket, members in each)
    latents += sum(latent(bucket, vae) for _, bucket in plan.assignment.held)
    clips = sum(map(len, plan.assignment.members)) + len(plan.assignment.held)
    return {"latents_gib": 2 * latents / GIB, "clips": clips}


def clip_cost(clip: tuple[int, int, int], vae: partial, dit: nn.Module | None) -> dict[str, Any]:
    """Return what one clip of (height, width, frames) costs, for a DiT where there is one."""
    height, width, frames = clip
    bucket = Bucket(height // GRID * GRID, width // GRID * GRID, 1 + (frames - 1) // TIME * TIME)
    patch = (1, 2, 2) if dit is None else cast(Sequence[int], dit.patch)
    t, h, w = positions(bucket, stride_of(vae))
    tokens = -(-t // patch[0]) * (h // patch[1]) * (w // patch[2])
    found: dict[str, Any] = {"asked": f"{width}x{height}x{frames}", "bucket": str(bucket)}
    found |= {"tokens": tokens, "latent_mib": 2 * latent(bucket, vae) / 2**20}
    if dit is not None:
        total, attention = forward_flops(dit, [tokens])
        found |= {"forward_tflop": total / 1e12, "attention": attention / total}
    return found
