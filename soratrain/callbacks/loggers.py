"""Where metrics go besides `metrics.csv`, which is always written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger


def csv(*, out: Path) -> list[Logger]:
    """Return no further logger."""
    return []


def wandb(*, out: Path, project: str = "soratrain", entity: str | None = None, tags: list[str] = ()) -> list[Logger]:  # type: ignore[assignment]
    """Return a Weights & Biases logger with its files in `out`; offline unless WANDB_API_KEY is set.

    The run's id is a hash of `out`, so that a continued run goes on in the same place.
    """
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


def show_files(logger: Logger, step: int, key: str, files: Sequence[Path], captions: Sequence[str] = ()) -> None:
    """Hand pictures or videos (MP4) to a logger that takes them; others pass them over."""
    if not isinstance(logger, WandbLogger) or not files:
        return
    told: dict[str, Any] = {"caption": list(captions)} if captions else {}
    paths = [str(file) for file in files]
    if files[0].suffix == ".mp4":
        logger.log_video(key, paths, step=step, format=["mp4"] * len(paths), **told)
    else:
        logger.log_image(key, paths, step=step, **told)


def show_table(logger: Logger, step: int, key: str, rows: Sequence[Mapping[str, str]]) -> None:
    """Hand the rows of a table, which all have the same columns, to a logger that takes it; others pass it over."""
    if isinstance(logger, WandbLogger) and rows:
        logger.log_table(key, columns=list(rows[0]), data=[list(row.values()) for row in rows], step=step)
