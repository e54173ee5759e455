"""A few frames of each sample, decoded ahead of the models that look at them, and the means of what these say."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from fractions import Fraction
from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from data_prep.raters import Rater
from soratrain.data.decode import decode, to_rgb
from soratrain.data.shards import ShardReader
from soratrain.errors import DataError

Row = dict[str, Any]
Seen = dict[str, list[np.ndarray]]  # a sample's pictures as each model takes them


@dataclass
class Found:
    """What is known of some samples.

    Attributes:
        scores: by model and key.
        failures: why others have none, by key.
    """

    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    _waiting: dict[str, list[tuple[str, list[np.ndarray]]]] = field(default_factory=dict)

    def add(self, key: str, seen: Seen | str) -> None:
        """Take a sample's pictures, or why there are none."""
        if isinstance(seen, str):
            self.failures[key] = seen
            return
        for name, pictures in seen.items():
            self._waiting.setdefault(name, []).append((key, pictures))

    def rate(self, raters: Mapping[str, Rater], least: int) -> None:
        """Let each model look at the pictures that wait for it, where these are at least so many."""
        for name, rater in raters.items():
            waiting = self._waiting.get(name, [])
            pictures = [picture for _, pictures in waiting for picture in pictures]
            if not least <= len(pictures):
                continue
            values = iter(rater.rate(pictures))
            for key, own in waiting:
                mean = fmean(next(values) for _ in own)
                if isfinite(mean):
                    self.scores.setdefault(name, {})[key] = round(mean, 4)
                else:
                    self.failures[key] = f"its {name} is {mean}"
            waiting.clear()

    def told(self, name: str) -> dict[str, Any]:
        """Return what is known by one model, as plain values."""
        return {"scores": self.scores.get(name, {}), "failures": self.failures}


def ahead(pool: ThreadPoolExecutor, do: Callable[[Row], Any], rows: Sequence[Row], most: int) -> Iterator[Any]:
    """Yield `do(row)` of each row in order, with at most so many begun and not yet taken."""
    begun: deque[Future[Any]] = deque()
    for row in rows:
        begun.append(pool.submit(do, row))
        if len(begun) >= most:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def looked_at(row: Row, *, folder: Path, raters: Mapping[str, Rater], frames: int) -> Seen | str:
    """Return a sample's pictures as each model takes them, or why there are none."""
    reader = ShardReader(folder)  # one a call: it is not for several threads at once
    try:
        media = reader.read(row["shard"], row["media_offset"], row["media_length"])
        if zlib.crc32(media) != row["crc32"]:
            return "its bytes are not those that the manifest knows (CRC-32)"
        fps = Fraction(row["fps_num"], row["fps_den"])
        pictures = [to_rgb(decode(media, fps=fps, start=place))[0] for place in places(row["frames"], frames)]
    except DataError as error:
        return str(error)
    finally:
        reader.close()
    return {name: [rater.prepare(picture) for picture in pictures] for name, rater in raters.items()}


def places(count: int, frames: int) -> list[int]:
    """Return the numbers of at most `frames` of `count` frames: the middles of as many equal parts."""
    return sorted({(2 * part + 1) * count // (2 * frames) for part in range(frames)})
