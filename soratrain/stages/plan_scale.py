"""What a run will hold on each rank, and how long its steps will take: of stage=plan."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.data.fitting import GRID, TIME
from soratrain.data.plan import Plan
from soratrain.diffusion.conditioning import Conditioning
from soratrain.distributed.memory import dit_activations, measured_activations
from soratrain.distributed.options import StrategyOptions
from soratrain.models.dit import Block, DiT
from soratrain.models.vae import VAE
from soratrain.stages.plan_cost import forward_flops
from soratrain.stages.plan_device import Device, rests_on
from soratrain.stages.plan_time import StepTime, Work, constants, step_time

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
        conditioning: what is given of clips; of their ends one latent frame stands twice.
    """

    def __init__(
        self,
        net: nn.Module,
        stride: Sequence[int],
        *,
        half: bool,
        sequence: int = 1,
        conditioning: Conditioning | None = None,
    ) -> None:
        assert isinstance(net, DiT) and isinstance(block := net.blocks[0], Block)
        self.net, self.half, self.sequence = net, half, sequence
        self.conditioning = conditioning or Conditioning()
        self.sizes: dict[str, Any] = {"dim": net.dim, "depth": net.depth, "mlp_ratio": block.up.out_features / net.dim}
        rows, columns = stride[1:]
        self.grid = GRID**2, rows * columns * math.prod(net.patch)  # type: ignore[arg-type]

    def tokens(self, counted: int) -> int:
        """Return the tokens of the DiT for those that a plan counts."""
        return counted * self.grid[0] // self.grid[1]

    def shown(self, bucket: Bucket) -> list[tuple[float, int]]:
        """Return, of the samples of a bucket, shares and the tokens that a plan would count of each."""
        frames = 1 + (bucket.frames - 1) // TIME
        share = self.conditioning.twice(frames)
        once, twice = (1 - share, bucket.tokens), (share, bucket.tokens // frames * (frames + 1))
        return [item for item in (once, twice) if item[0]]

    def largest(self, plan: Plan) -> int:
        """Return the most tokens of a micro-batch, as a plan counts; whichever may have their end given have it."""
        counts, buckets = plan.blocks.expected, plan.assignment.buckets
        most = [max(tokens for _, tokens in self.shown(bucket)) for bucket in buckets]
        if plan.batching == "pack":
            packs = list(zip(counts, buckets, most, strict=True))
            grown = sum(count * tokens for count, _, tokens in packs)
            return round(plan.blocks.largest[0] * grown / sum(count * bucket.tokens for count, bucket, _ in packs))
        return max(size * tokens for size, tokens in zip(plan.sizes, most, strict=True))

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
        """Return the bytes that a rank hands to those it shares tokens with: q, k, v and the result, there and back.

        Where anything is computed again both exchanges are, since what follows them needs what they gave.
        """
        own, others = tokens / self.sequence, (self.sequence - 1) / self.sequence
        times = 2 if self.net.recompute == "none" else 3
        return times * 4 * own * self.sizes["dim"] * self.sizes["depth"] * (2 if self.half else 4) * others

    def of_a_step(self, plan: Plan, ranks: int, parameters: int) -> Work:
        """Return what a rank does in a step, on average over steps; `ranks` that have micro-batches of their own."""
        shown = [
            (plan.accumulate_blocks * count / ranks * share, tokens)
            for count, bucket in zip(plan.blocks.expected, plan.assignment.buckets, strict=True)
            for share, tokens in self.shown(bucket)
        ]
        flops = [(count, *forward_flops(self.net, [self.tokens(tokens)])) for count, tokens in shown]
        attention = sum(count * part for count, _, part in flops)
        products = sum(count * (every - part) for count, every, part in flops)
        counted = round(sum(count * tokens for count, tokens in shown))
        # of a block's products (4 D² to see, 4 D² to read but for what text gives, two of its MLP) the first of the MLP
        up = self.sizes["mlp_ratio"] / (6 + 2 * self.sizes["mlp_ratio"])
        again = {"none": (0.0, 0.0), "selective": (up, 0.0), "full": (1.0, 1.0)}[self.net.recompute]
        return Work(
            products=products / self.sequence,
            attention=attention / self.sequence,
            again=again,
            exchanged=self.exchanged(self.tokens(counted)),
            kept=self.activations(counted, "none"),
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


def predicted(
    work: Work,
    options: StrategyOptions,
    device: Device,
    *,
    ranks: int,
    nodes: int,
    half: bool,
    sizes: Sequence[float],
    sequence: int = 1,
) -> dict[str, Any]:
    """Return seconds of a step, what they go to, utilisation and hours, for `sizes`: steps, and tokens of a step.

    Beside them what they rest on: each figure and constant, and where it is from.
    """
    found: StepTime = step_time(work, options, device, ranks=ranks, nodes=nodes, half=half)
    seconds = {name: value for name, value in vars(found).items() if name != "utilisation" and value}
    steps, tokens = sizes
    figures = rests_on(device, options, half=half, ranks=ranks, nodes=nodes, sequence=sequence)
    return {
        "estimate": True,
        "nodes": nodes,
        "seconds": seconds,
        "step_seconds": found.total,
        "utilisation": found.utilisation,
        "tokens_per_s": tokens / found.total,
        "hours": steps * found.total / 3600,
        "rests_on": [*figures, *constants(half)],
    }
