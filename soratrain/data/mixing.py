"""Showing clips at several durations, and setting the share of single frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from soratrain.data.buckets import Assignment, Bucket
from soratrain.data.fitting import TIME
from soratrain.errors import ConfigError


def spread(assignment: Assignment, durations: Sequence[int] | None, image_fraction: float | None) -> Assignment:
    """Let clips be shown at several durations, and set the share of single frames.

    Args:
        durations: frame counts 1 + 4k; a clip is shown at each that it has, equally often. None: at its own.
        image_fraction: share of samples in [0, 1] that are single frames, of stills and of clips. None: as it comes.

    Raises ConfigError for a duration off the grid or longer than every clip, or a share that the data cannot give.
    """
    if durations is not None:
        if wrong := [count for count in durations if count < 1 or count % TIME != 1]:
            raise ConfigError(f"data.durations holds {wrong[0]}; use numbers of frames of the form 1+{TIME}k")
        longest = max(bucket.frames for bucket in assignment.buckets)
        if durations and max(durations) > longest:
            raise ConfigError(f"data.durations holds {max(durations)}, but the longest clips have {longest} frames")
        pools: dict[Bucket, list[tuple[np.ndarray, float]]] = {}
        for bucket, members, rate in zip(assignment.buckets, assignment.members, assignment.rates, strict=True):
            options = sorted({count for count in durations if count <= bucket.frames}) or [bucket.frames]
            for count in options:
                pools.setdefault(bucket._replace(frames=count), []).append((members, rate / len(options)))
        assignment = replace(
            assignment,
            buckets=tuple(sorted(pools)),
            members=tuple(np.sort(np.concatenate([part for part, _ in pools[name]])) for name in sorted(pools)),
            rates=tuple(sum(rate for _, rate in pools[name]) for name in sorted(pools)),
        )
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
    )
