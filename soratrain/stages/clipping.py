"""A limit of the gradient's norm that follows the norms of the steps before."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

DECAY = 0.99  # of the running mean and mean square: about the last hundred steps
FIRST = 20  # steps from whose norms the first limit comes


class AdaptiveClip:
    """Limits a norm to the running mean plus so many running deviations.

    A norm above the limit enters the averages as the limit: a spike leaves them nearly as they were, and norms that
    have risen for good raise it step by step. One that is not finite does not enter. Norms are the same on all ranks,
    so that limits are; they stay on their device, and nothing waits for it.

    Args:
        deviations: above the mean, 3 say.
    """

    def __init__(self, deviations: float) -> None:
        self.deviations, self.seen = deviations, 0
        self.sums: Tensor | None = None  # decayed sums of 1, of norms and of their squares, fp64 `[3]`

    def __call__(self, norm: Tensor, ceiling: float) -> Tensor | None:
        """Return the limit of this step, at most `ceiling` (0: none), and take note of `norm`; None: no limit yet."""
        value = norm.detach().double()
        sums = torch.zeros(3, dtype=torch.float64) if self.sums is None else self.sums
        sums = sums.to(value.device)
        limit = value.new_tensor(ceiling) if ceiling else None
        if self.seen >= FIRST:
            mean, square = sums[1] / sums[0], sums[2] / sums[0]
            usual = mean + self.deviations * (square - mean**2).clamp(min=0).sqrt()
            usual = torch.where(sums[0] > 0, usual, torch.inf)  # not one of them may have entered
            limit = usual if limit is None else torch.minimum(usual, limit)
        taken = value if limit is None else torch.minimum(value, limit)
        entered = DECAY * sums + (1 - DECAY) * torch.stack([torch.ones_like(taken), taken, taken**2])
        self.sums = torch.where(value.isfinite(), entered, sums)
        self.seen += 1
        return limit

    def state_dict(self) -> dict[str, Any]:
        """Return what later limits depend on, as plain numbers."""
        return {"seen": self.seen, "sums": None if self.sums is None else self.sums.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]
        self.sums = None if state["sums"] is None else torch.tensor(state["sums"], dtype=torch.float64)
