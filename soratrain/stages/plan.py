"""stage=plan: what a training run will do with its data, what it will hold in memory, and what a clip costs.

Nothing is trained, no weights are read and no GPU is needed: all of it follows from the manifest and the config.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from soratrain.data.assignment import Bucket
from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.datamodule import VideoData
from soratrain.data.fitting import GRID, TIME
from soratrain.data.held_out import HeldOut
from soratrain.data.plan import Plan
from soratrain.distributed.memory import GIB, Kept, dit_activations, kept, measured_activations
from soratrain.distributed.mesh import check_ranks
from soratrain.distributed.strategy import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.models.vae import VAE
from soratrain.stages.plan_cost import forward_flops, positions, stride_of
from soratrain.stages.plan_table import show

TARGETS = ("vae", "captioner", "dit")
BALANCED_OVER = 64  # steps over which the balance of the ranks is worked out
EXAMPLE = (1, 3, 9, 64, 64)  # the clip on which a VAE's activations are measured


class PlanStage:
    """The job of `stage=plan`.

    Args:
        out: folder of `plan.json`.
        target: the stage to plan for: `vae`, `captioner` or `dit`.
        ranks: of the run, all of them.
        sequence: of these, how many share the tokens of a micro-batch.
        shards: folder or URL of the clips, or several.
        buckets: how sizes are chosen.
        nets: factory of each net that a target trains, by name.
        steps: optimizer steps, by target.
        tuned: `tokens` of a micro-batch, by target.
        max_steps, batch_size, tokens_per_batch, max_batch_size: in the place of these, where they are set.
        clip: `WIDTHxHEIGHTxFRAMES`: what one such clip costs; None leaves it out.
        seed, batching, accumulate_blocks, gamma, quadratic, window, mix, image_fraction: of the data.
        durations: of clips; latents are shown at their own.
        strategy, optimizer, average, precision: of the trainer.
        held_out: samples that stage=dit does not train on.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        target: str,
        ranks: int,
        shards: str | Sequence[str],
        buckets: Buckets,
        nets: Mapping[str, partial],
        steps: Mapping[str, int],
        tuned: Mapping[str, Mapping[str, Any]],
        seed: int,
        strategy: StrategyOptions,
        optimizer: str,
        average: bool,
        precision: str,
        sequence: int = 1,
        clip: str | None = None,
        batching: str = "bucket",
        accumulate_blocks: int = 1,
        gamma: float = 0.0,
        quadratic: float = 0.0,
        window: int = 64,
        mix: Sequence[float] | None = None,
        image_fraction: float | None = None,
        durations: Sequence[int] | None = None,
        max_steps: int = 0,
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        max_batch_size: int | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        if target not in TARGETS:
            raise ConfigError(f"stage.job.target={target} is not there; use one of {', '.join(TARGETS)}")
        if ranks < 1:
            raise ConfigError(f"stage.job.ranks={ranks} must be at least 1")
        check_ranks(sequence, ranks, f"stage.job.ranks={ranks}")
        if batching == "pack" and target != "dit":
            raise ConfigError(f"data.batching=pack: stage={target} takes clips of one size; packs are of latents")
        self.clip = parse_clip(clip) if clip else None
        self.out, self.target, self.ranks, self.sequence = Path(out), target, ranks, sequence
        self.nets, self.strategy, self.optimizer, self.average = nets, strategy, optimizer, average
        self.crop = int(tuned[target].get("crop", 0))  # pixels: stage=vae trains on squares cut from its clips
        self.steps, self.half = max_steps or int(steps[target]), precision.startswith("bf16")
        self.data = VideoData(
            shards=shards,
            buckets=buckets,
            seed=seed,
            max_steps=self.steps,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch or (None if batch_size else int(tuned[target]["tokens"])),
            max_batch_size=max_batch_size or tuned[target].get("batch"),
            batching=batching,
            accumulate_blocks=accumulate_blocks,
            canonical_ranks=ranks // sequence,
            gamma=gamma,
            quadratic=quadratic,
            window=window,
            mix=mix,
            image_fraction=image_fraction,
            durations=durations if target != "dit" else None,
            held_out=held_out if target == "dit" else None,
        )

    def __call__(self) -> dict[str, Any]:
        """Print the plan, write `plan.json` and return its chief figures."""
        plan, summary = self.data.plan(self.ranks // self.sequence), self.data.summary()
        with torch.device("meta"):
            parts = {name: factory() for name, factory in self.nets.items() if name in self.trained}
        run = self.run_figures(plan)
        for item in summary["sets"]:
            item["epochs"] = run["samples_per_step"] * self.steps * item["shown"] / max(item["samples"], 1)
        memory = self.memory(parts, plan)
        document = {
            "target": self.target,
            "ranks": self.ranks,
            "sequence": self.sequence,
            "run": run,
            "data": summary,
            "balance": balance(plan, self.ranks // self.sequence),
            "memory": memory,
            "cache": self.cache(plan, parts),
            "clip": self.cost(self.clip, parts) if self.clip else None,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.out / "plan.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        show(Console(soft_wrap=True, highlight=False), document)
        figures = {"steps": self.steps, "epochs": run["epochs"], "buckets": len(summary["buckets"])}
        return figures | {"memory_gib": memory["total_gib"], "plan": str(self.out / "plan.json")}

    @property
    def trained(self) -> tuple[str, ...]:
        """Return the nets that the target trains."""
        return {"vae": ("vae",), "captioner": ("captioner", "text"), "dit": ("dit", "text")}[self.target]

    def run_figures(self, plan: Plan) -> dict[str, Any]:
        """Return steps, epochs, samples and tokens of the whole run."""
        each = [plan.accumulate_blocks * count for count in plan.blocks.expected]
        samples = sum(each)
        tokens = sum(count * bucket.tokens for count, bucket in zip(each, plan.assignment.buckets, strict=True))
        return {
            "steps": self.steps,
            "samples_per_step": samples,
            "tokens_per_step": tokens,
            "epochs": samples * self.steps / sum(plan.assignment.rates),
            "tokens": tokens * self.steps,
        }

    def memory(self, parts: Mapping[str, nn.Module], plan: Plan) -> dict[str, Any]:
        """Return what a rank holds, by component, with the largest micro-batch."""
        parameters = sum(parameter.numel() for net in parts.values() for parameter in net.parameters())
        tokens, said = plan.blocks.largest
        activations = self.activations(parts, plan, tokens)
        moments = 1 if self.optimizer == "muon" else 2
        held: Kept = kept(
            parameters,
            zero=self.strategy.zero,
            ranks=self.ranks,
            moments=moments,
            average=self.average,
            activations=activations,
        )
        components = {name: value for name, value in vars(held).items() if value is not None}
        return {
            "estimate": True,
            "parameters": parameters,
            "strategy": self.strategy.name,
            "largest": f"{said}, {tokens:,} tokens",
            "gib": {name: value / GIB for name, value in components.items()},
            "total_gib": held.total / GIB,
        }

    def activations(self, parts: Mapping[str, nn.Module], plan: Plan, tokens: int) -> int | None:
        """Return the bytes that the largest micro-batch keeps; None for a net of which nothing is known."""
        itemsize = 2 if self.half else 4
        if self.target == "dit":
            net, shape = parts["dit"], self.nets["dit"].keywords
            rows, columns = stride_of(self.nets["vae"])[1:]
            tokens = tokens * GRID**2 // (rows * columns * math.prod(net.patch))  # type: ignore[arg-type]
            tokens = -(-tokens // self.sequence)
            sizes = {name: shape[name] for name in ("dim", "depth", "mlp_ratio")}
            again = shape.get("recompute", "none")
            shared = self.sequence > 1
            return dit_activations(tokens=tokens, itemsize=itemsize, recompute=again, shared=shared, **sizes)
        if self.target == "vae":
            example = torch.zeros(EXAMPLE)
            pixels = max(
                size * 3 * bucket.frames * math.prod(min(side, self.crop or side) for side in bucket[:2])
                for size, bucket in zip(plan.sizes, plan.assignment.buckets, strict=True)
            )
            return int(measured_activations(Reconstruction(self.nets["vae"]()), example) * pixels * itemsize / 4)
        return None

    def cache(self, plan: Plan, parts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return the size of all cached latents in bf16."""
        each = zip(plan.assignment.buckets, plan.assignment.members, strict=True)
        latents = sum(len(members) * self.latent(bucket) for bucket, members in each)
        latents += sum(self.latent(bucket) for _, bucket in plan.assignment.held)
        clips = sum(map(len, plan.assignment.members)) + len(plan.assignment.held)
        return {"latents_gib": 2 * latents / GIB, "clips": clips}

    def latent(self, bucket: Bucket) -> int:
        """Return the numbers in the latent of one clip of a bucket."""
        factory = self.nets["vae"]
        return factory.keywords["latent_channels"] * math.prod(positions(bucket, stride_of(factory)))

    def cost(self, clip: tuple[int, int, int], parts: Mapping[str, nn.Module]) -> dict[str, Any]:
        """Return what one clip of (height, width, frames) costs."""
        height, width, frames = clip
        bucket = Bucket(height // GRID * GRID, width // GRID * GRID, 1 + (frames - 1) // TIME * TIME)
        patch: Sequence[int] = parts["dit"].patch if "dit" in parts else (1, 2, 2)  # type: ignore[assignment]
        t, h, w = positions(bucket, stride_of(self.nets["vae"]))
        tokens = -(-t // patch[0]) * (h // patch[1]) * (w // patch[2])
        found: dict[str, Any] = {"bucket": str(bucket), "tokens": tokens, "latent_mib": 2 * self.latent(bucket) / 2**20}
        if "dit" in parts:
            total, attention = forward_flops(parts["dit"], [tokens])
            found |= {"forward_tflop": total / 1e12, "attention": attention / total}
        return found


class Reconstruction(nn.Module):
    """A VAE's way from pixels to pixels, as training takes it."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.vae.decode_chunk(self.vae.posterior(x)[0])[0]


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
