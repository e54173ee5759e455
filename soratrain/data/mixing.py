"""Holding samples out, showing clips at several durations, mixing data sets, setting the share of single frames."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from soratrain.batch import draw_of
from soratrain.data.assignment import Assignment, Bucket, keep_assignment, map_assignment
from soratrain.data.buckets import BlockSize, Buckets
from soratrain.data.budget import Budget
from soratrain.data.fitting import TIME
from soratrain.data.held_out import chosen, without
from soratrain.data.manifest import Manifest
from soratrain.data.node import shared
from soratrain.errors import ConfigError

FORM = 2  # of what buckets make of samples: a change of the rules raises it


def assigned(
    manifest: Manifest,
    buckets: Buckets,
    budget: Budget,
    ranks: int,
    *,
    durations: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    image_fraction: float | None = None,
    held_out: int = 0,
) -> Assignment:
    """Return what `assign` makes of these, worked out by the first process of the node that asks."""
    wanted: dict[str, Any] = {"durations": durations, "weights": weights, "image_fraction": image_fraction}
    wanted["held_out"] = held_out

    def work_out(new: Path) -> None:
        found = assign(manifest, buckets, lambda bucket: budget.samples(bucket) * ranks, ranks, **wanted)
        keep_assignment(found, new)

    policy = type(buckets).__name__, sorted(vars(buckets).items())
    name = draw_of(FORM, manifest.hash, manifest.home, policy, budget, ranks, sorted(wanted.items()))
    return map_assignment(str(shared(f"buckets-{name:016x}", work_out)))


def assign(
    manifest: Manifest,
    buckets: Buckets,
    block: BlockSize,
    ranks: int,
    *,
    durations: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    image_fraction: float | None = None,
    held_out: int = 0,
) -> Assignment:
    """Put the samples of each data set into buckets of its own, and set how often each bucket is shown.

    Args:
        durations: frame counts 1 + 4k; a clip is shown at each that it has, equally often. None: at its own.
        weights: how large a share of the samples shown is of each data set, relative. None: as they come.
        image_fraction: share of samples in [0, 1] that are single frames, of stills and of clips. None: as it comes.
        held_out: samples that are never shown; see `chosen`.

    Raises:
        ConfigError: a duration off the grid or longer than every clip; weights that do not fit the data sets; a share
            that the data cannot give.
    """
    sets = manifest.sets
    if weights is not None and (len(weights) != len(sets) or min(weights) <= 0):
        raise ConfigError(
            f"data.mix={list(weights)}: must hold one positive number for each data set ({manifest.folder}), or be"
            " null, which takes all samples equally often"
        )
    if wrong := [count for count in durations or () if count < 1 or count % TIME != 1]:
        raise ConfigError(f"data.durations holds {wrong[0]}; use numbers of frames of the form 1+{TIME}k")
    held, starts = chosen(manifest, held_out), np.cumsum([0, *map(len, sets)]).tolist()
    parts = [
        without(buckets.assign(part, block, ranks), held[(held >= start) & (held < stop)] - start)
        for part, (start, stop) in zip(sets, pairwise(starts), strict=True)
    ]
    longest = max(bucket.frames for part in parts for bucket in part.buckets)
    if durations and max(durations) > longest:
        raise ConfigError(f"data.durations holds {max(durations)}, but the longest clips have {longest} frames")
    parts = [lasting(part, durations) for part in parts]
    return with_images(put_together(parts, [len(part) for part in sets], weights), image_fraction)


def put_together(parts: Sequence[Assignment], counts: Sequence[int], weights: Sequence[float] | None) -> Assignment:
    """Return the assignments of several data sets, of `counts` samples each, as one."""
    if len(parts) == 1:
        return parts[0]
    shown = [sum(part.rates) for part in parts]
    wanted = weights or shown
    factors = [sum(shown) * weight / sum(wanted) / own for weight, own in zip(wanted, shown, strict=True)]
    starts = np.cumsum([0, *counts[:-1]]).tolist()
    return Assignment(
        buckets=tuple(bucket for part in parts for bucket in part.buckets),
        members=tuple(own + start for part, start in zip(parts, starts, strict=True) for own in part.members),
        rates=tuple(rate * factor for part, factor in zip(parts, factors, strict=True) for rate in part.rates),
        stride=np.concatenate([part.stride for part in parts]),
        merged=tuple(item for part in parts for item in part.merged),
        rare=tuple(bucket for part in parts for bucket in part.rare),
        dropped=dict(sum((Counter(part.dropped) for part in parts), Counter())),
        sets=tuple(number for number, part in enumerate(parts) for _ in part.buckets),
        held=tuple((s + start, name) for part, start in zip(parts, starts, strict=True) for s, name in part.held),
    )


def lasting(assignment: Assignment, durations: Sequence[int] | None) -> Assignment:
    """Show each clip at every one of `durations` that it has, equally often; one that has none at its own."""
    if durations is None:
        return assignment
    pools: dict[Bucket, list[tuple[np.ndarray, float]]] = {}
    for bucket, members, rate in zip(assignment.buckets, assignment.members, assignment.rates, strict=True):
        options = sorted({count for count in durations if count <= bucket.frames}) or [bucket.frames]
        for count in options:
            pools.setdefault(bucket._replace(frames=count), []).append((members, rate / len(options)))
    return replace(
        assignment,
        buckets=tuple(sorted(pools)),
        members=tuple(np.sort(np.concatenate([part for part, _ in pools[name]])) for name in sorted(pools)),
        rates=tuple(sum(rate for _, rate in pools[name]) for name in sorted(pools)),
    )


def with_images(assignment: Assignment, image_fraction: float | None) -> Assignment:
    """Set the share of single frames; the rest keeps its proportions. Raises ConfigError where that cannot be."""
    if image_fraction is None:
        return assignment
    if not 0 <= image_fraction <= 1:
        raise ConfigError(f"data.image_fraction={image_fraction}: must be between 0 and 1")
    shares = [0.0, 0.0]
    for bucket, rate in zip(assignment.buckets, assignment.rates, strict=True):
        shares[bucket.frames == 1] += rate
    for wanted, have, what in ((1 - image_fraction, shares[0], "clips"), (image_fraction, shares[1], "single frames")):
        if wanted > 0 and not have:
            raise ConfigError(
                f"data.image_fraction={image_fraction}: the data holds no {what}; set it to null, or put 1 into"
                " data.durations"
            )
    total = sum(shares)
    factors = [total * (1 - image_fraction) / (shares[0] or 1), total * image_fraction / (shares[1] or 1)]
    keep = [index for index, bucket in enumerate(assignment.buckets) if factors[bucket.frames == 1] > 0]
    return replace(
        assignment,
        buckets=tuple(assignment.buckets[index] for index in keep),
        members=tuple(assignment.members[index] for index in keep),
        rates=tuple(assignment.rates[index] * factors[assignment.buckets[index].frames == 1] for index in keep),
        sets=tuple(assignment.sets[index] for index in keep) if assignment.sets else (),
    )
