"""A run goes on with its tokens shared by more ranks, or by fewer, as if nothing had changed; or stops on all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from test_strategies import steps

from soratrain.errors import DataError

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
        assert one.pop("padding") == 0 <= other.pop("padding") < 0.1  # what shared tokens are filled up with
        assert one == pytest.approx(other, rel=1e-4)
        assert one["samples"] == other["samples"] and one["tokens"] == other["tokens"]


def torn(out: str, latents: str) -> None:
    """Train while the second rank alone finds a sample damaged."""
    from tiny_dit import train

    from soratrain.data.dataset import LatentSource

    load, calls = LatentSource.load, []

    def fails(source: LatentSource, *rest: Any) -> Any:
        calls.append(rest)
        if os.environ["LOCAL_RANK"] == "1" and len(calls) == 5:
            raise DataError("is torn")
        return load(source, *rest)

    LatentSource.load = fails
    train(out, latents, strategy="ddp", ranks=2, sequence=2, every=0, data={"batch_size": 1})


def test_ranks_that_have_read_different_samples_stop_and_say_so(tmp_path: Path) -> None:
    from data_tiny import write_latents
    from tiny_dit import SHAPES

    with pytest.raises(RuntimeError) as stopped:
        run_ranks(torn, 2, timeout=60, out=str(tmp_path / "out"), latents=str(write_latents(tmp_path / "l", SHAPES)))
    said = str(stopped.value)  # the first to say it may end the other before that one has said the same
    assert "DataError: ranks that share their tokens have read different samples" in said
    for rank in (0, 1):
        assert f"rank {rank}: DataError: " in said or f"rank {rank} died with exit code" in said
