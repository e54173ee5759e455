"""A validation's figures: the mean loss of each noise level and size, with the trained and the averaged weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from soratrain.callbacks.metrics import shown
from soratrain.data.assignment import Bucket


@dataclass(frozen=True)
class Table:
    """Means over the clips of each size.

    Attributes:
        sizes: height, width and frames, shorter and smaller ones first.
        clips: how many clips each size has.
        levels: noise levels of each size, rising `[sizes, levels]`.
        losses: by name of the weights, of each size at each level `[sizes, levels]`; those that matter most first.
    """

    sizes: tuple[Bucket, ...]
    clips: tuple[int, ...]
    levels: Tensor
    losses: Mapping[str, Tensor]

    @classmethod
    def of(cls, losses: Mapping[str, Tensor], buckets: Sequence[Bucket], levels: Tensor) -> Table:
        """Return the table of each clip's losses `[clips, levels]`, by name of the weights, its size and its levels."""
        sizes = sorted(set(buckets), key=lambda size: (size.frames, size.height * size.width, size))
        places = [[place for place, bucket in enumerate(buckets) if bucket == size] for size in sizes]
        return cls(
            sizes=tuple(sizes),
            clips=tuple(len(own) for own in places),
            levels=torch.stack([levels[own[0]] for own in places]),
            losses={
                name: torch.stack([values.double()[own].mean(0) for own in places]) for name, values in losses.items()
            },
        )

    @property
    def first(self) -> str:
        """The weights that matter most."""
        return next(iter(self.losses))

    def at_levels(self, name: str) -> Tensor:
        """Return the mean over clips at each level `[levels]`."""
        weights = torch.tensor(self.clips, dtype=torch.float64)
        return (self.losses[name] * weights[:, None]).sum(0) / weights.sum()

    def mean(self, name: str) -> float:
        """Return the mean over clips and levels."""
        return float(self.at_levels(name).mean())

    @property
    def shared_levels(self) -> list[float] | None:
        """The levels, where they are the same for all sizes."""
        return self.levels[0].tolist() if (self.levels == self.levels[0]).all() else None

    def rows(self, step: int) -> list[dict[str, str]]:
        """Return the table as rows of a CSV."""
        rows = []
        for name, losses in self.losses.items():
            for size, clips, levels, values in zip(self.sizes, self.clips, self.levels, losses, strict=True):
                for level, loss in zip(levels.tolist(), values.tolist(), strict=True):
                    row = {"step": str(step), "weights": name, "level": f"{level:.5f}"}
                    row |= {"size": f"{size.width}x{size.height}", "frames": str(size.frames)}
                    rows.append(row | {"loss": shown(loss), "clips": str(clips)})
        return rows

    def words(self) -> str:
        """Return the means, and where the loss is lowest and highest, for a log."""
        means = ", ".join(f"{self.mean(name):.4g} ({name})" for name in self.losses)
        each = self.at_levels(self.first)
        names = [f"noise level {level:.3g}" for level in self.shared_levels or ()]
        names = names or [f"noise level {number + 1} of {len(each)}" for number in range(len(each))]
        low, high = int(each.argmin()), int(each.argmax())
        return f"loss {means}; from {each[low]:.4g} at {names[low]} to {each[high]:.4g} at {names[high]}"
