"""Where metrics go besides `metrics.csv`, which is always written."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger


def csv(*, out: Path) -> list[Logger]:
    """Return no further logger."""
    return []


def wandb(*, out: Path, project: str = "soratrain", entity: str | None = None, tags: list[str] = ()) -> list[Logger]:  # type: ignore[assignment]
    """Return a Weights & Biases logger with its files in `out`; offline unless WANDB_API_KEY is set.

    The run's id is a hash of `out`, so that a continued run goes on in the same place.
    """
    from lightning.pytorch.loggers import WandbLogger

    offline = "WANDB_API_KEY" not in os.environ
    place = Path(out).resolve()
    settings: dict[str, Any] = {} if entity is None else {"entity": entity}
    if not offline:
        settings["resume"] = "allow"
    os.environ.setdefault("WANDB_SILENT", "true")
    return [
        WandbLogger(
            project=project,
            name="/".join(place.parts[-3:]),
            id=hashlib.sha256(str(place).encode()).hexdigest()[:16],
            save_dir=str(place),
            offline=offline,
            tags=list(tags),
            **settings,
        )
    ]
