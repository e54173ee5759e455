"""A run whose process is killed goes on as if it had not been; `make bench ONLY=kills` has the long table."""

from __future__ import annotations

from pathlib import Path

import pytest
from kills import Kill, broken, curve, identical, latents, samples, whole

pytestmark = pytest.mark.full

STEPS = 10
KILLS = [
    Kill(0, 5, "after the backward pass"),
    Kill(1, 8, "before a batch"),
    Kill(1, 6, "half a file written"),
    Kill(0, 6, "folder renamed"),
]


@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("zero2", 2)])
def test_whoever_is_killed_whenever_the_same_command_gives_the_run_that_was_not(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    data, how = latents(tmp_path / "latents"), {"strategy": strategy, "ranks": ranks, "max_steps": STEPS}
    whole(tmp_path / "whole", data, **how)
    assert len(samples(tmp_path / "whole")) == len(curve(tmp_path / "whole")) == STEPS
    for number, kill in enumerate(KILLS):
        out, kill = tmp_path / str(number), Kill(kill.rank % ranks, kill.step, kill.moment)
        left, ended = broken(out, data, kill, **how)
        assert left == f"step-{3 if kill.moment != 'folder renamed' and kill.step <= 6 else 6:08d}", kill
        assert ended < 20, f"{kill}: the other process went on for {ended:.0f} s"
        whole(out, data, attempt=2, **how)
        assert identical(tmp_path / "whole", out), kill
        assert not list((out / "checkpoints").glob(".*"))


@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3"])
def test_killed_on_two_ranks_gone_on_with_one_and_again_with_two_the_samples_are_the_same(
    strategy: str, tmp_path: Path
) -> None:
    data, how = latents(tmp_path / "latents"), {"max_steps": 9}
    whole(tmp_path / "whole", data, strategy=strategy, ranks=2, **how)
    out = tmp_path / "changed"
    broken(out, data, Kill(1, 5, "after the update"), strategy=strategy, ranks=2, **how)
    broken(out, data, Kill(0, 8, "before a batch"), strategy="single", ranks=1, attempt=2, **how)
    whole(out, data, strategy=strategy, ranks=2, attempt=3, **how)
    assert samples(tmp_path / "whole") == samples(out)
    for one, other in zip(curve(tmp_path / "whole"), curve(out), strict=True):
        assert float(one["loss"]) == pytest.approx(float(other["loss"]), rel=1e-5)
        assert float(one["grad_norm"]) == pytest.approx(float(other["grad_norm"]), rel=1e-4)
