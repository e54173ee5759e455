"""What a plan will do, in numbers, before anything is read."""

from __future__ import annotations

from typing import Any

import numpy as np

from soratrain.data.decode import scaled_size
from soratrain.data.fitting import distinct
from soratrain.data.manifest import Manifest
from soratrain.data.plan import Plan


def summarise(plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """Return what the plan makes of the data, as plain values.

    `buckets`: per bucket its samples, those in a micro-batch (in packs on average) and their tokens, the share of
    blocks (in packs of tokens) that it has, and its share of the samples shown;
    `sets`: of several data sets, each with its samples in buckets and its share of the samples shown;
    `merged`, `rare`, `dropped`: with counts and reasons; `frames_discarded`: share of the frames of the samples
    shown that are not (cut off in time, or passed over by a lower rate); `pixels_discarded`: share of a shown frame's
    area that cropping takes away, on average over samples. Both weigh each bucket as it is shown, where data are mixed.
    """
    assignment = plan.assignment
    packs, expected = plan.batching == "pack", plan.blocks.expected
    each = [count / plan.canonical_ranks for count in expected] if packs else plan.sizes
    parts = [
        count * (bucket.tokens if packs else 1 / size)
        for bucket, count, size in zip(assignment.buckets, expected, plan.sizes, strict=True)
    ]
    folders = [part.folder for part in manifest.sets]
    buckets, shown, there, cropped = [], 0.0, 0.0, 0.0
    for index, bucket in enumerate(assignment.buckets):
        members, rate = assignment.members[index], assignment.rates[index]
        buckets.append(
            {
                "bucket": str(bucket),
                "data": folders[assignment.sets[index] if assignment.sets else 0],
                "samples": len(members),
                "batch_size": each[index],
                "tokens": each[index] * bucket.tokens,
                "blocks": parts[index] / sum(parts),
                "shown": rate / sum(assignment.rates),
            }
        )
        shown += rate * bucket.frames
        there += rate * float(manifest.frames[members].mean(dtype=np.float64))
        sizes, _, counts = distinct(np.stack([manifest.h[members], manifest.w[members]], 1))
        for (height, width), count in zip(sizes.tolist(), counts.tolist(), strict=True):
            scaled_height, scaled_width = scaled_size(height, width, bucket)
            lost = 1 - bucket.height * bucket.width / (scaled_height * scaled_width)
            cropped += lost * count / len(members) * rate
    return {
        "samples": len(manifest),
        "batching": plan.batching,
        "buckets": buckets,
        "sets": of_sets(plan, manifest) if len(folders) > 1 else [],
        "merged": [{"from": str(a), "to": str(b), "samples": count} for a, b, count in assignment.merged],
        "rare": [str(bucket) for bucket in assignment.rare],
        "dropped": dict(assignment.dropped),
        "frames_discarded": max(0.0, 1 - shown / there),
        "pixels_discarded": cropped / sum(assignment.rates),
    }


def of_sets(plan: Plan, manifest: Manifest) -> list[dict[str, Any]]:
    """Return folder, samples that are in a bucket, and share of the samples shown of each data set."""
    assignment, start, found = plan.assignment, 0, []
    used = np.zeros(len(manifest), dtype=bool)
    for members in assignment.members:
        used[members] = True
    for number, part in enumerate(manifest.sets):
        rates = [rate for rate, of in zip(assignment.rates, assignment.sets, strict=True) if of == number]
        samples = int(used[start : start + len(part)].sum())
        found.append({"data": part.folder, "samples": samples, "shown": sum(rates) / sum(assignment.rates)})
        start += len(part)
    return found


def remarks(summary: dict[str, Any]) -> list[str]:
    """Return what somebody should know before training, as lines for a log."""
    text = [
        f"{counted(summary['samples'])} in {len(summary['buckets'])} buckets; {summary['frames_discarded']:.1%} of"
        f" frames and {summary['pixels_discarded']:.1%} of pixels are not shown in an epoch"
    ]
    text += [f"  {counted(item['samples'])} of {item['from']} merged into {item['to']}" for item in summary["merged"]]
    text += [f"  {counted(count)} dropped: {reason}" for reason, count in summary["dropped"].items()]
    if summary["rare"]:
        text.append(f"  smaller batches, for want of samples: {', '.join(summary['rare'])}")
    return text


def counted(samples: int) -> str:
    """Return a number of samples in words."""
    return f"{samples} sample{'s' * (samples != 1)}"


def table(summary: dict[str, Any]) -> list[str]:
    """Return one line a bucket."""
    what = "tokens" if summary["batching"] == "pack" else "blocks"
    return [
        f"  {item['bucket']:>14}  {item['samples']:>8} samples  {item['batch_size']:>5.4g} a micro-batch"
        f"  {item['tokens']:>7.0f} tokens  {item['blocks']:>6.1%} of {what}"
        for item in summary["buckets"]
    ]
