"""What a run will hold on each rank, and how long its steps will take: of stage=plan."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from soratrain.data.fitting import GRID
from soratrain.data.plan import Plan
from soratrain.distributed.memory import dit_activations, measured_activations
from soratrain.distributed.options import StrategyOptions
from soratrain.models.dit import Block, DiT
from soratrain.models.frozen_text import FrozenText
from soratrain.models.vae import VAE
from soratrain.stages.plan_cost import forward_flops
from soratrain.stages.plan_time import Device, StepTime, Work, step_time

EXAMPLE = (1, 3, 9, 64, 64)  # the clip on which a VAE's activations are measured


class Reconstruction(nn.Module):
    """A VAE's way from pixels to pixels, as training takes it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.decode_chunk(self.vae.posterior(x)[0])[0]


class DiTWork:
    """What a DiT computes and keeps.

    Args:
        net: on meta.
        stride: of the VAE in time, rows and columns, which says how many tokens a clip has.
        half: whether it computes in bf16.
        sequence: ranks that share the tokens of each micro-batch.
    """

    def __init__(self, net: nn.Module, stride: Sequence[int], *, half: bool, sequence: int = 1) -> None:
        assert isinstance(net, DiT) and isinstance(block := net.blocks[0], Block)
        self.net, self.half, self.sequence = net, half, sequence
        self.sizes: dict[str, Any] = {"dim": net.dim, "depth": net.depth, "mlp_ratio": block.up.out_features / net.dim}
        rows, columns = stride[1:]
        self.grid = GRID**2, rows * columns * math.prod(net.patch)  # type: ignore[arg-type]

    def tokens(self, counted: int) -> int:
        """Return the tokens of the DiT for those that a plan counts."""
        return counted * self.grid[0] // self.grid[1]

    def activations(self, counted: int, recompute: str | None = None) -> int:
        """Return the bytes that a micro-batch of so many of a plan's tokens keeps at its peak."""
        return dit_activations(
            tokens=-(-self.tokens(counted) // self.sequence),
            itemsize=2 if self.half else 4,
            recompute=recompute or self.net.recompute,
            shared=self.sequence > 1,
            **self.sizes,
        )

    def exchanged(self, tokens: int) -> float:
        """Return the bytes that a rank hands to those it shares tokens with: q, k, v and the result, there and back."""
        own, others = tokens / self.sequence, (self.sequence - 1) / self.sequence
        return 2 * 4 * own * self.sizes["dim"] * self.sizes["depth"] * (2 if self.half else 4) * others

    def of_a_step(self, plan: Plan, ranks: int, parameters: int) -> Work:
        """Return what a rank does in a step, on average over steps; `ranks` that have micro-batches of their own."""
        counts = [plan.accumulate_blocks * count / ranks for count in plan.blocks.expected]
        tokens = [self.tokens(bucket.tokens) for bucket in plan.assignment.buckets]
        flops = [forward_flops(self.net, [length]) for length in tokens]
        attention = sum(count * part for count, (_, part) in zip(counts, flops, strict=True))
        products = sum(count * (every - part) for count, (every, part) in zip(counts, flops, strict=True))
        shown = sum(count * bucket.tokens for count, bucket in zip(counts, plan.assignment.buckets, strict=True))
        # of a block's products (4 D² to see, 4 D² to read but for what text gives, two of its MLP) the first of the MLP
        up = self.sizes["mlp_ratio"] / (6 + 2 * self.sizes["mlp_ratio"])
        again = {"none": (0.0, 0.0), "selective": (up, 0.0), "full": (1.0, 1.0)}[self.net.recompute]
        return Work(
            products=products / self.sequence,
            attention=attention / self.sequence,
            again=again,
            exchanged=self.exchanged(self.tokens(round(shown))),
            kept=self.activations(round(shown), "none"),
            blocks=self.sizes["depth"],
            parameters=parameters,
            micro_batches=plan.per_rank(ranks),
        )


def vae_activations(vae: partial, plan: Plan, crop: int, *, half: bool) -> int:
    """Return the bytes that a VAE keeps of the largest micro-batch, squares of `crop` pixels cut from it or all."""
    example = torch.zeros(EXAMPLE)
    pixels = max(
        size * 3 * bucket.frames * math.prod(min(side, crop or side) for side in bucket[:2])
        for size, bucket in zip(plan.sizes, plan.assignment.buckets, strict=True)
    )
    return int(measured_activations(Reconstruction(vae()), example) * pixels * (2 if half else 4) / 4)


def beside(parts: Mapping[str, nn.Module], vae: partial, *, live: bool) -> tuple[dict[str, int], str]:
    """Return the bytes of what a rank computes with beside the nets that it trains, and what is not known of it."""
    found, unknown = {}, ""
    if live:
        with torch.device("meta"):
            found["the VAE's weights"] = 4 * sum(parameter.numel() for parameter in vae().parameters())
    text = parts.get("text")
    if isinstance(text, FrozenText) and (live or text.mode == "live"):
        files = sorted((Path(text.folder) / (text.options["subfolder"] or "")).glob("*.safetensors"))
        item = 2 if text.options["dtype"] == "bf16" else 4
        if files:
            found["the text encoder's weights"] = item * sum(map(numbers, files))
        else:
            unknown = f"; the text encoder runs live, and {text.folder} is not here to be counted"
    return found, unknown


def numbers(file: Path) -> int:
    """Return how many numbers a file of safetensors holds."""
    with safe_open(str(file), framework="pt") as stored:
        return sum(math.prod(stored.get_slice(key).get_shape()) for key in stored.keys())  # noqa: SIM118


def predicted(
    work: Work, options: StrategyOptions, device: Device, *, ranks: int, nodes: int, half: bool, sizes: Sequence[float]
) -> dict[str, Any]:
    """Return seconds of a step, what they go to, utilisation and hours, for `sizes`: steps, and tokens of a step."""
    found: StepTime = step_time(work, options, device, ranks=ranks, nodes=nodes, half=half)
    seconds = {name: value for name, value in vars(found).items() if name != "utilisation" and value}
    steps, tokens = sizes
    return {
        "estimate": True,
        "nodes": nodes,
        "seconds": seconds,
        "step_seconds": found.total,
        "utilisation": found.utilisation,
        "tokens_per_s": tokens / found.total,
        "hours": steps * found.total / 3600,
    }
