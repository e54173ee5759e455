"""Optimizer steps whose loss or gradient is no number: skipped on all ranks alike, and borne only so often in a row.

Pixels come as uint8 and cannot be NaN themselves; what can is what the nets make of them.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.distributed import halt
from soratrain.errors import ConfigError, DivergedError, on_all_ranks

log = logging.getLogger(__name__)


class StepGuard:
    """Decides which updates are skipped, and when it is enough.

    They are counted in a row, not in all: a long run may meet a bad batch now and then, and a run that is lost meets
    nothing else.

    Args:
        limit: steps in a row that may be skipped; the next one ends the run.

    Attributes:
        in_a_row: steps skipped since the last one that was not; it belongs into checkpoints.
    """

    def __init__(self, limit: int) -> None:
        if limit < 0:
            raise ConfigError(f"max_bad_steps={limit} must be at least 0")
        self.limit, self.in_a_row = limit, 0

    def spoilt(self, values: Sequence[Tensor]) -> list[bool]:
        """Return for each of `values` whether any of its numbers is not finite on any rank; collective."""
        flags = torch.stack([(~value.detach().isfinite()).any() for value in values]).float()
        if halt.together():
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return [flag > 0 for flag in flags.tolist()]

    def count(self, skipped: Sequence[str], step: int) -> None:
        """Take note of `step`, in which the updates of `skipped` were left out; nothing there is a good step.

        Raises:
            DivergedError: too many in a row.
        """
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if not skipped:
            return
        whose = " and ".join(skipped)
        if self.in_a_row > self.limit:
            raise on_all_ranks(
                DivergedError(
                    f"the loss or gradient of {whose} is no number at step {step}, the {self.in_a_row}. step in a row;"
                    " the last checkpoint stands: lower optimizer.lr, or set trainer.precision=32-true"
                )
            )
        if halt.speaks():
            log.warning(
                "step %d: the loss or gradient of %s is no number, the update is skipped (%d in a row, %d may be)",
                step,
                whose,
                self.in_a_row,
                self.limit,
            )
