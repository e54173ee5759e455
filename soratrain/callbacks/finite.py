"""Weights that are no numbers are never kept: neither in a checkpoint nor in an export."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from soratrain.distributed import halt
from soratrain.distributed.strategy import Restorable
from soratrain.errors import DivergedError, on_all_ranks


class Finite(L.Callback):
    """Looks at every trained weight before anything of it is written.

    The loss and the gradient are looked at too (`Metrics`, `StepGuard`), but an optimizer may overflow on finite ones,
    and of that only the next step's loss would tell.
    """

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.check(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.check(trainer)

    def check(self, trainer: L.Trainer) -> None:
        """Look now; every rank calls it.

        Raises:
            DivergedError: on every rank, when a weight of any is not finite.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        held = [fragment.read() for fragment in strategy.fragments() if fragment.trained]
        norms = torch._foreach_norm(held, float("inf")) if held else []
        bad = torch.zeros((), device=trainer.lightning_module.device)
        if norms:
            bad = (~torch.stack([norm.to(bad.device) for norm in norms]).isfinite()).any().float()
        if halt.together():
            dist.all_reduce(bad, op=dist.ReduceOp.MAX)
        if bad > 0:
            raise on_all_ranks(
                DivergedError(
                    f"a weight is no number after step {trainer.global_step}; the last checkpoint stands: lower"
                    " optimizer.lr, or set trainer.precision=32-true"
                )
            )
