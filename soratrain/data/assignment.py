"""Which samples share a size: the outcome of putting them into buckets."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from soratrain.data.fitting import GRID, TIME
from soratrain.data.node import mapped, new_array


class Bucket(NamedTuple):
    """A size that samples share: pixels, pixels, frames."""

    height: int
    width: int
    frames: int

    @property
    def tokens(self) -> int:
        """Return the tokens of one sample: one a latent frame and 16 × 16 pixels."""
        return (1 + (self.frames - 1) // TIME) * (self.height // GRID) * (self.width // GRID)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}x{self.frames}"


@dataclass(frozen=True)
class Assignment:
    """Which samples a bucket holds.

    Attributes:
        buckets: in a fixed order.
        members: sample numbers of each bucket, ascending, int64.
        rates: how many samples of each bucket make up one epoch; its number of members unless mixed otherwise.
        stride: every how many source frames one is taken, [N], int64.
        merged: (from, to, samples) for buckets that were too rare to fill a good part of a block.
        rare: buckets that do not fill a block; their micro-batches are smaller.
        dropped: samples in no bucket, by reason.
        sets: which data set each bucket's samples are of, by number; all of the first where there is none.
        held: samples that are held out of training, each with the bucket that it would be in.
        home: folder of files that hold the numbers, where they are mapped and not in this process's memory.
    """

    buckets: tuple[Bucket, ...]
    members: tuple[np.ndarray, ...]
    rates: tuple[float, ...]
    stride: np.ndarray
    merged: tuple[tuple[Bucket, Bucket, int], ...] = ()
    rare: tuple[Bucket, ...] = ()
    dropped: dict[str, int] = field(default_factory=dict)
    sets: tuple[int, ...] = ()
    held: tuple[tuple[int, Bucket], ...] = ()
    home: str | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place of mapped numbers instead of the numbers."""
        if self.home is not None:
            return map_assignment, (self.home,)
        return Assignment, tuple(getattr(self, item.name) for item in fields(self))

    @property
    def names(self) -> tuple[tuple[int, ...], ...]:
        """What tells the buckets apart: of several data sets, two may have the same size."""
        numbered = zip(self.buckets, self.sets or (0,) * len(self.buckets), strict=True)
        return tuple((*bucket, number) if number else bucket for bucket, number in numbered)


def map_assignment(home: str) -> Assignment:
    """Return the assignment whose numbers are files in `home`."""
    told = json.loads((Path(home) / "buckets.json").read_text(encoding="utf-8"))
    members = mapped(Path(home) / "members.npy")
    return Assignment(
        buckets=tuple(Bucket(*sizes) for sizes in told["buckets"]),
        members=tuple(members[start:stop] for start, stop in pairwise(told["bounds"])),
        rates=tuple(told["rates"]),
        stride=mapped(Path(home) / "stride.npy"),
        merged=tuple((Bucket(*source), Bucket(*target), count) for source, target, count in told["merged"]),
        rare=tuple(Bucket(*sizes) for sizes in told["rare"]),
        dropped=told["dropped"],
        sets=tuple(told["sets"]),
        held=tuple((sample, Bucket(*sizes)) for sample, sizes in told["held"]),
        home=home,
    )


def keep_assignment(assignment: Assignment, new: Path) -> None:
    """Write an assignment as files into `new`."""
    bounds = [0, *accumulate(map(len, assignment.members))]
    new_array(new / "members.npy", np.int64, bounds[-1])[:] = np.concatenate(assignment.members)
    new_array(new / "stride.npy", np.int64, len(assignment.stride))[:] = assignment.stride
    names = ("buckets", "rates", "merged", "rare", "dropped", "sets", "held")
    told = {"bounds": bounds} | {name: getattr(assignment, name) for name in names}
    (new / "buckets.json").write_text(json.dumps(told), encoding="utf-8")
