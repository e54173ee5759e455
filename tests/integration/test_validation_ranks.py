"""Any number of ranks measures the same, and draws the same, under every strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from data_tiny import write_latents
from PIL import Image, ImageChops
from ranks import run_ranks
from tiny_dit import SHAPES, previews, train, write_vae

from soratrain.callbacks.metrics import read_rows

SLOW = [("zero1", 1), ("zero3", 1), ("ddp", 2), ("zero3", 2)]
COMMON = {"clips": 3, "max_steps": 3, "every": 2}  # three clips: the second rank has nothing left in the last turn


def trained(out: str, batch: int, **settings: Any) -> tuple[float, int]:
    """Train; return the loss, and how often this rank has said that it moved."""
    trainer, _, found = train(out, previews=previews(settings["vae"], batch=batch), **settings)
    return found["val_loss"], trainer.profiler.moves  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("strategy", "sequence"),
    [("ddp", 1), ("zero2", 2), *(pytest.param(*way, marks=pytest.mark.full) for way in SLOW)],
)
def test_two_ranks_write_the_table_and_the_samples_of_one(strategy: str, sequence: int, tmp_path: Path) -> None:
    latents, vae = write_latents(tmp_path / "latents", SHAPES), write_vae(tmp_path / "vae")
    common = COMMON | {"latents": str(latents), "vae": str(vae)}
    ((alone, _),) = run_ranks(trained, 1, out=str(tmp_path / "one"), batch=4, accumulate=2, **common)
    settings = {"strategy": strategy, "ranks": 2, "sequence": sequence}
    both = run_ranks(trained, 2, out=str(tmp_path / "two"), batch=1, **settings, **common)
    assert [loss for loss, _ in both] == pytest.approx([alone, alone], rel=1e-4)
    assert both[0][1] == both[1][1]  # or the rank that is behind would not be the one with less
    one, two = (read_rows(tmp_path / name / "validation.csv") for name in ("one", "two"))
    assert len(one) == len(two) > 0
    for left, right in zip(one, two, strict=True):
        assert float(left.pop("loss")) == pytest.approx(float(right.pop("loss")), rel=1e-4)
        assert left == right
    names = [sorted(path.name for path in (tmp_path / run / "samples").iterdir()) for run in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 2 * 3
    with Image.open(tmp_path / "one/samples/00000003.png") as a, Image.open(tmp_path / "two/samples/00000003.png") as b:
        assert max(high for _, high in ImageChops.difference(a, b).getextrema()) <= 4
