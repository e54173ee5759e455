"""Sets sequence parallelism up from outside: the net but has a place where it is hung in."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from soratrain.batch import Batch, draw_of
from soratrain.distributed import halt
from soratrain.distributed.mesh import Mesh
from soratrain.distributed.sequence import Ulysses, group_of, share
from soratrain.errors import DataError


class ShareTokens(L.Callback):
    """Lets the stage's DiT share its packs among the ranks of a group, once the strategy has the nets in place.

    Args:
        timeout: how long a rank waits for another of its group.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout
        self.mesh = Mesh(0, 1)
        self.group: Any = None

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.mesh = Mesh.of(trainer)
        self.group = group_of(self.mesh, self.timeout, "gloo")  # asks from CPU to CPU, so that no device has to wait
        share(pl_module, Ulysses.joined(self.mesh, self.timeout))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """See that all ranks of the group have read the same samples: one of them may have had to replace one.

        Raises:
            DataError: on all ranks of the group; the others then stop as well.
        """
        assert isinstance(batch, Batch)
        own = torch.tensor([draw_of(*batch.keys, *batch.captions)])
        found = [torch.empty_like(own) for _ in range(self.mesh.sequence)]
        dist.all_gather(found, own, group=self.group)
        if any(other != found[0] for other in found):
            reason = (
                "ranks that share their tokens have read different samples: one of them could not read what another"
                " could; see what the log says is replaced, and that all nodes see the same data. The same command goes"
                " on from the last checkpoint"
            )
            halt.announce(reason)
            raise DataError(reason)
