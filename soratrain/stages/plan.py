"""stage=plan: what a training run will do with its data, what it will hold in memory, how long a step takes, and
what a clip costs.

Nothing is trained, no weights are read and no GPU is needed: all of it follows from the manifest and the config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.datamodule import VideoData
from soratrain.data.held_out import HeldOut
from soratrain.data.plan import Plan
from soratrain.diffusion.conditioning import Conditioning
from soratrain.distributed.components import components
from soratrain.distributed.memory import GIB
from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.models.frozen_text import FrozenText
from soratrain.stages.beside import Beside, frozen_nets, live_text, live_vae
from soratrain.stages.plan_cost import balance, cache_size, clip_cost, parse_clip, run_figures, stride_of
from soratrain.stages.plan_device import device_of, on_gpu
from soratrain.stages.plan_ranks import ranks_of
from soratrain.stages.plan_scale import DiTWork, predicted, vae_activations
from soratrain.stages.plan_table import show

TRAINED = {"vae": ("vae",), "captioner": ("captioner", "text"), "dit": ("dit", "text")}  # nets, by target


class PlanStage:
    """The job of `stage=plan`.

    Args:
        out: folder of `plan.json`.
        target: the stage to plan for: `vae`, `captioner` or `dit`.
        ranks, nodes, trainer_nodes, trainer_devices, sequence: who computes (`plan_ranks.ranks_of`).
        shards: folder or URL of the clips, or several.
        buckets: how sizes are chosen.
        nets: factory of each net that a target trains, by name.
        steps: optimizer steps, by target.
        tuned: `tokens` of a micro-batch, by target.
        max_steps, batch_size, tokens_per_batch, max_batch_size: in the place of these, where they are set.
        clip: `WIDTHxHEIGHTxFRAMES`: what one such clip costs; None leaves it out, and so does the target `captioner`.
        crop: pixels of the squares that stage=vae cuts from its clips, in the place of `tuned`.
        seed, batching, accumulate_blocks, canonical_ranks, gamma, quadratic, window, mix, image_fraction: of the data.
        durations: of clips; latents are shown at their own.
        strategy, optimizer, average, precision: of the trainer.
        device: one of `devices` by name, on which it runs; None: h100, or cpu where `machine` is `laptop`.
        devices: peaks, bandwidths and what of them is reached, by name (`plan_device.Device`).
        machine: `laptop` or `gpu`.
        latents: `cached`, or made `live`.
        vae: where the VAE lies that then makes them; one that the config alone describes counts as well.
        conditioning: what stage=dit gives of clips.
        held_out: samples that stage=dit does not train on.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        target: str,
        shards: str | Sequence[str],
        buckets: Buckets,
        nets: Mapping[str, partial],
        steps: Mapping[str, int],
        tuned: Mapping[str, Mapping[str, Any]],
        seed: int,
        strategy: StrategyOptions,
        optimizer: str,
        average: float,
        precision: str,
        sequence: int = 1,
        devices: Mapping[str, Mapping[str, Any]],
        device: str | None = None,
        machine: str = "laptop",
        ranks: int | None = None,
        nodes: int | None = None,
        trainer_nodes: int = 1,
        trainer_devices: int | str = "auto",
        latents: str = "cached",
        vae: str = "",
        conditioning: Conditioning | None = None,
        clip: str | None = None,
        batching: str = "bucket",
        accumulate_blocks: int = 1,
        canonical_ranks: int | None = None,
        crop: int | None = None,
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
        if target not in TRAINED:
            raise ConfigError(f"stage.job.target={target} is not there; use one of {', '.join(TRAINED)}")
        if batching == "pack" and target != "dit":
            raise ConfigError(f"data.batching=pack: stage={target} takes clips of one size; packs are of latents")
        self.clip = parse_clip(clip) if clip else None
        self.device_name = device or ("cpu" if machine == "laptop" else "h100")
        self.cuda = on_gpu(devices, self.device_name)
        spread = self.spread = ranks_of(
            ranks,
            nodes,
            trainer_nodes=trainer_nodes,
            trainer_devices=trainer_devices,
            strategy=strategy,
            sequence=sequence,
            on_gpu=self.cuda,
        )
        self.out, self.target, self.ranks, self.sequence = Path(out), target, spread.count, sequence
        self.nets, self.strategy, self.optimizer, self.average = nets, strategy, optimizer, average
        self.crop = int(crop or tuned[target].get("crop", 0))
        self.steps, self.half = max_steps or int(steps[target]), precision.startswith("bf16")
        self.device, self.nodes = device_of(devices, self.device_name, self.half, ranks=self.ranks, nodes=spread.nodes)
        self.live, self.vae, self.conditioning = latents == "live", vae, conditioning
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
            canonical_ranks=canonical_ranks or self.ranks // sequence,
            gamma=gamma,
            quadratic=quadratic,
            window=window,
            mix=mix,
            image_fraction=image_fraction,
            durations=durations if target != "dit" or self.live else None,
            held_out=held_out if target == "dit" else None,
        )

    def __call__(self) -> dict[str, Any]:
        """Print the plan, write `plan.json` and return its chief figures."""
        plan, summary = self.data.plan(self.ranks // self.sequence), self.data.summary()
        with torch.device("meta"):
            parts = {name: factory() for name, factory in self.nets.items() if name in TRAINED[self.target]}
        run = run_figures(plan, self.steps)
        for item in summary["sets"]:
            item["epochs"] = run["samples_per_step"] * self.steps * item["shown"] / max(item["samples"], 1)
        memory, time = self.memory(parts, plan), self.time(parts, plan, run)
        latents = self.target != "captioner"  # which sees pixels
        document = {
            "target": self.target,
            "ranks": self.ranks,
            "sequence": self.sequence,
            "ranks_from": self.spread.said,
            "note": self.spread.note,
            "run": run,
            "data": summary,
            "balance": balance(plan, self.ranks // self.sequence),
            "memory": memory,
            "time": time,
            "cache": cache_size(plan, self.nets["vae"]) if latents else None,
            "clip": clip_cost(self.clip, self.nets["vae"], parts.get("dit")) if self.clip and latents else None,
        }
        self.out.mkdir(parents=True, exist_ok=True)
        with replacing(self.out / "plan.json") as temporary:
            temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        show(Console(soft_wrap=True, highlight=False), document)
        figures = {"steps": self.steps, "epochs": run["epochs"], "buckets": len(summary["buckets"])}
        figures |= {"step_seconds": time["step_seconds"]} if time else {}
        return figures | {"memory_gib": memory["total_gib"], "plan": str(self.out / "plan.json")}

    def memory(self, parts: Mapping[str, nn.Module], plan: Plan) -> dict[str, Any]:
        """Return what a rank holds, by component, with the largest micro-batch."""
        tokens, said = plan.blocks.largest
        beside, text = Beside(), parts.get("text")
        if self.live:
            live_vae(self.vae, self.nets["vae"], beside)
        if isinstance(text, FrozenText) and (self.live or text.mode == "live"):
            live_text(text, beside)
        frozen_nets(parts.values(), beside)
        held = components(
            parts.values(),
            self.strategy,
            ranks=self.ranks,
            optimizer=self.optimizer,
            average=self.average > 0,
            half=self.half,
            cuda=self.cuda,
            accumulates=plan.per_rank(self.ranks // self.sequence) > 1,
            activations=self.activations(parts, plan),
            beside=beside.bytes,
        )
        return {
            "estimate": True,
            "parameters": held.parameters,
            "strategy": self.strategy.name,
            "recompute": getattr(parts.get("dit"), "recompute", None),
            "largest": f"{said}, {tokens:,} tokens",
            "gib": {part.name: held.of(part.name) / GIB for part in held.components},
            "on_host": [part.name for part in held.components if part.host],
            "total_gib": held.total(host=False) / GIB,
            "host_gib": held.total(host=True) / GIB,
            "device_gib": self.device.memory_gib if self.cuda else None,
            "said": held.line(self.strategy.name, "cuda" if self.cuda else "cpu") + beside.said,
        }

    def activations(self, parts: Mapping[str, nn.Module], plan: Plan) -> int | None:
        """Return the bytes that the largest micro-batch keeps; None for a net of which nothing is known."""
        if self.target == "dit":
            work = self.dit(parts)
            return work.activations(work.largest(plan))
        return vae_activations(self.nets["vae"], plan, self.crop, half=self.half) if self.target == "vae" else None

    def dit(self, parts: Mapping[str, nn.Module]) -> DiTWork:
        """Return what the DiT computes and keeps."""
        stride = live_vae(self.vae, self.nets["vae"], Beside()) if self.live else None
        stride = stride or stride_of(self.nets["vae"])
        return DiTWork(parts["dit"], stride, half=self.half, sequence=self.sequence, conditioning=self.conditioning)

    def time(self, parts: Mapping[str, nn.Module], plan: Plan, run: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return how long a step takes; None for a net of which nothing is known."""
        if self.target != "dit":
            return None
        parameters = sum(parameter.numel() for net in parts.values() for parameter in net.parameters())
        dit = self.dit(parts)
        work = dit.of_a_step(plan, self.ranks // self.sequence, parameters)
        found = predicted(
            work,
            self.strategy,
            self.device,
            ranks=self.ranks,
            nodes=self.nodes,
            half=self.half,
            sizes=(self.steps, dit.tokens(round(run["tokens_per_step"]))),
            sequence=self.sequence,
        )
        return {"device": self.device_name, "on_gpu": self.cuda, **found}
