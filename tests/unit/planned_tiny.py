"""Small shards, and what stage=plan says of them."""

from __future__ import annotations

import json
from pathlib import Path

from data_tiny import write_clips

from soratrain.run import prepare, run

SHAPES = [(48, 64, 9)] * 12 + [(64, 48, 1)] * 6 + [(8, 8, 1)] * 2


DDP = ("strategy=ddp",)


WORDS = ["stage=plan", "machine=laptop", "upstream=fail", "validation=none"]


def write_shards(folder: Path) -> None:
    write_clips(folder, SHAPES)
    (folder / "dataset.json").write_text("{}")  # what says that they are whole


def planned(folder: Path, *words: str) -> dict:
    """Return plan.json of the command."""
    config, overrides = prepare([*WORDS, f"inputs.shards={folder / 'shards'}", f"out={folder / 'plan'}", *words])
    run(config, overrides)
    return json.loads((folder / "plan" / "plan.json").read_text())
