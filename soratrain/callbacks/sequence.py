"""Sets sequence parallelism up from outside: the net but has a place where it is hung in."""

from __future__ import annotations

from datetime import timedelta

import lightning as L

from soratrain.distributed.mesh import Mesh
from soratrain.distributed.sequence import Ulysses, share


class ShareTokens(L.Callback):
    """Lets the stage's DiT share its packs among the ranks of a group, once the strategy has the nets in place.

    Args:
        timeout: how long a rank waits for another of its group.
    """

    def __init__(self, timeout: timedelta) -> None:
        self.timeout = timeout

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        share(pl_module, Ulysses.joined(Mesh.of(trainer), self.timeout))
