"""How equally ranks work in each micro-step, ours beside the two usual ways to batch, on one mixed manifest."""

from __future__ import annotations

import math

import numpy as np

from soratrain.data.assignment import Bucket
from soratrain.data.buckets import Native
from soratrain.data.budget import Budget
from soratrain.data.manifest import Manifest
from soratrain.data.plan import Plan
from soratrain.data.summary import summarise

TITLE = "Cost balance over 64 ranks, 200,000 clips and images of mixed size and duration (mean / max cost a micro-step)"
RANKS, MICRO_STEPS, TOKENS, QUADRATIC = 64, 400, 60_000, 1 / (6 * 2048)
SIZES = [(720, 1280), (1080, 1920), (1280, 720), (480, 832), (512, 512), (360, 640), (768, 1024), (816, 1920)]


def mixed(count: int, seed: int = 0) -> Manifest:
    """Return a manifest of clips whose sizes, durations and rates are mixed as in a collection from the web."""
    draws = np.random.default_rng(seed)
    sizes = np.array(SIZES, dtype=np.int32)[draws.integers(0, len(SIZES), count)]
    image = draws.random(count) < 0.2
    frames = np.where(image, 1, np.clip(draws.lognormal(4.6, 0.7, count), 5, 480).astype(np.int32)).astype(np.int32)
    zeros = np.zeros(count, dtype=np.int64)
    keys = np.char.zfill(np.arange(count).astype(str), 32).astype("S32")
    return Manifest(
        folder="nowhere",
        key=keys,
        shards=("shard-000000.tar",),
        shard=zeros,
        exts=("mp4",),
        ext=zeros,
        image=image,
        h=sizes[:, 0],
        w=sizes[:, 1],
        frames=frames,
        fps_num=np.full(count, 24, dtype=np.int32),
        fps_den=np.ones(count, dtype=np.int32),
        json_offset=zeros,
        json_length=zeros,
        media_offset=zeros,
        media_length=zeros,
        crc32=zeros,
    )


def row(name: str, ratios: list[float], note: str) -> dict[str, str]:
    """Return a row of the table."""
    return {
        "way": name,
        "mean / max": f"{np.median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})",
        "note": note,
    }


def measure() -> list[dict[str, str]]:
    """Return the table."""
    manifest = mixed(200_000)
    budget = Budget(tokens_per_batch=TOKENS, quadratic=QUADRATIC)

    def block(bucket: Bucket) -> int:
        return budget.samples(bucket) * RANKS

    assignment = Native(max_size="1280x720", max_frames=121).assign(manifest, block, RANKS)
    plan = Plan(assignment=assignment, manifest=manifest, seed=0, budget=budget, canonical_ranks=RANKS)

    def cost(bucket: int, samples: int) -> float:
        return samples * budget.cost(assignment.buckets[bucket])

    def balance(plan: Plan) -> list[float]:
        found = []
        for index in range(MICRO_STEPS):
            micros = [plan.local(index, rank, RANKS) for rank in range(RANKS)]
            costs = [sum(cost(bucket, 1) for bucket in micro.buckets) for micro in micros]
            found.append(sum(costs) / RANKS / max(costs))
        return found

    packed, costliest = [], math.ceil(max(map(budget.cost, assignment.buckets)))
    for many in (2, 3):
        cap = Budget(tokens_per_batch=many * costliest, quadratic=QUADRATIC)
        packs = Plan(
            assignment=assignment, manifest=manifest, seed=0, budget=cap, batching="pack", canonical_ranks=RANKS
        )
        filled = f"a cap of {many} of the costliest clips, {packs.blocks.cost / RANKS / cap.cap:.0%} used"
        packed.append(row("ours: packs of any sizes", balance(packs), filled))
    draws = np.random.default_rng(1)
    share = np.array([len(members) for members in assignment.members]) / sum(map(len, assignment.members))
    fixed, independent = [], []
    for _ in range(MICRO_STEPS):
        # a fixed number of clips, each rank's of a bucket of its own
        costs = [cost(int(bucket), 4) for bucket in draws.choice(len(share), RANKS, p=share)]
        fixed.append(sum(costs) / RANKS / max(costs))
        # as many clips as a budget of tokens holds, each rank's of a bucket of its own
        chosen = draws.choice(len(share), RANKS, p=share)
        tokens = [assignment.buckets[int(bucket)].tokens for bucket in chosen]
        counts = [max(1, TOKENS // each) for each in tokens]
        costs = [cost(int(bucket), number) for bucket, number in zip(chosen, counts, strict=True)]
        independent.append(sum(costs) / RANKS / max(costs))
    found = summarise(plan, manifest)
    lost = (
        f"padding 0 %, {found['frames_discarded']:.1%} of frames and {found['pixels_discarded']:.1%} of pixels cut off"
    )
    return [
        row("ours: blocks of one bucket over all ranks", balance(plan), lost),
        *packed,
        row("token budget, a bucket of its own for each rank", independent, "attention's cost not counted"),
        row("4 clips, a bucket of its own for each rank", fixed, ""),
    ]
