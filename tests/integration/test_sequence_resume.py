"""A run goes on with its tokens shared by more ranks, or by fewer, as if nothing had changed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_strategies import steps

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

pytestmark = pytest.mark.full
STEPS = 6


def trained(out: str, latents: str, **settings: Any) -> None:
    """Train until `stop_at`, or to the end, with a row of metrics for every two steps."""
    from tiny_dit import train

    train(out, latents, max_steps=STEPS, every=0, log_every=2, **settings)


def test_a_run_goes_on_with_any_number_of_ranks_that_share_its_tokens(tmp_path: Path) -> None:
    from data_tiny import write_latents
    from tiny_dit import SHAPES

    common = {"latents": str(write_latents(tmp_path / "latents", SHAPES)), "data": {"canonical_ranks": 2}}
    run_ranks(trained, 1, out=str(tmp_path / "whole"), **common)
    broken = {"out": str(tmp_path / "broken"), **common}
    run_ranks(trained, 1, stop_at=1, **broken)
    run_ranks(trained, 2, strategy="zero2", ranks=2, sequence=2, stop_at=3, **broken)
    run_ranks(trained, 4, strategy="zero3", ranks=4, sequence=2, stop_at=5, **broken)
    run_ranks(trained, 2, strategy="ddp", ranks=2, sequence=2, **broken)
    whole, found = steps(tmp_path / "whole"), steps(tmp_path / "broken")
    assert [row["step"] for row in whole] == [row["step"] for row in found] == [2, 4, 6]
    for one, other in zip(whole, found, strict=True):
        assert one == pytest.approx(other, rel=1e-4)
        assert one["samples"] == other["samples"] and one["tokens"] == other["tokens"]
