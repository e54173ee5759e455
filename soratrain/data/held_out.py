"""Which samples are held out of training, so that a loss can be measured on clips that a net has never seen.

A hash of its key says whether a sample is: neither the seed nor ranks, buckets or the form of the data (clips or their
latents) make a difference, so all stages and runs on the same data agree, and one that goes on from another's weights.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from soratrain.batch import draw_of
from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.buckets import Stored
from soratrain.data.dataset import LatentSource
from soratrain.data.manifest import Manifest
from soratrain.data.order import mixed
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError, DataError

MOST = 10  # at most one of so many samples of a data set is held out
REASON = "held out of training, for validation"


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """How many samples, or which.

    Attributes:
        clips: how many, at most a tenth of each data set.
        latents: folder or URL of latents from which they are taken instead; all other data are trained on.

    Raises:
        ConfigError: a negative number, or a folder of which nothing is taken.
    """

    clips: int = 0
    latents: str | None = None

    def __post_init__(self) -> None:
        if self.clips < 0:
            raise ConfigError(f"validation.clips={self.clips}: must be at least 0; 0 holds no clips out")
        if self.latents and not self.clips:
            raise ConfigError(f"validation.latents={self.latents} with validation.clips=0: say how many are measured")

    @property
    def count(self) -> int:
        """How many of the training data's own samples are held out."""
        return 0 if self.latents else self.clips

    def beside(self, trained: Manifest, remote: Remote | None) -> tuple[LatentSource, Sequence[tuple[int, Bucket]]]:
        """Return what reads the folder of latents, and the samples that are taken from it, with their buckets.

        Raises:
            DataError: the folder does not hold latents, or samples that are `trained` on.
        """
        assert self.latents
        manifest = read_manifest(self.latents)
        if manifest.exts != ("safetensors",):
            raise DataError(f"validation.latents={self.latents}: holds {', '.join(manifest.exts)}, not latents")
        taken = lowest(manifest, min(self.clips, len(manifest)))
        shared = np.isin(manifest.key[taken], trained.key)
        if shared.any():
            raise DataError(
                f"validation.latents={self.latents}: {shared.sum()} of its samples are trained on too, the first"
                f" {manifest.key[taken][shared][0].decode()}; take them out of one, or leave validation.latents out"
            )
        held = without(Stored().assign(manifest, lambda bucket: 1), taken).held
        return LatentSource(manifest, 0, remote), held


def lowest(manifest: Manifest, count: int) -> np.ndarray:
    """Return the `count` samples whose keys have the lowest hashes, ascending by hash, int64."""
    words = np.ascontiguousarray(manifest.key).astype("S32", copy=False).view("<u8").reshape(-1, 4)
    hashes = np.full(len(manifest), np.uint64(draw_of("held out")))
    for word in words.T:
        hashes = mixed(hashes ^ word)
    first = np.argpartition(hashes, count - 1)[:count] if 0 < count < len(hashes) else np.arange(len(hashes))[:count]
    return first[np.argsort(hashes[first], kind="stable")]


def chosen(manifest: Manifest, count: int) -> np.ndarray:
    """Return the samples that are held out, ascending, int64: `count`, or fewer where data sets are small."""
    found = lowest(manifest, min(count, len(manifest) // MOST))
    bounds = np.cumsum([0, *map(len, manifest.sets)]).tolist()
    kept = [found[(found >= start) & (found < stop)][: (stop - start) // MOST] for start, stop in pairwise(bounds)]
    return np.sort(np.concatenate(kept))


def without(assignment: Assignment, held: np.ndarray) -> Assignment:
    """Return an assignment of which no bucket holds any of the samples `held`; a bucket of which none is left goes."""
    if not len(held):
        return assignment
    each = zip(assignment.buckets, assignment.members, assignment.rates, strict=True)
    left, out = [], list[tuple[int, Bucket]]()
    for place, (bucket, members, rate) in enumerate(each):
        gone = np.isin(members, held)
        out += [(int(sample), bucket) for sample in members[gone]]
        if not gone.all():
            left.append((place, members[~gone], rate * float((~gone).mean())))
    places = [place for place, _, _ in left]
    buckets = tuple(assignment.buckets[place] for place in places)
    return replace(
        assignment,
        buckets=buckets,
        members=tuple(members for _, members, _ in left),
        rates=tuple(rate for _, _, rate in left),
        rare=tuple(bucket for bucket in assignment.rare if bucket in buckets),
        dropped=dict(Counter(assignment.dropped) + Counter({REASON: len(out)})),
        sets=tuple(assignment.sets[place] for place in places) if assignment.sets else (),
        held=tuple(sorted(out)),
    )
