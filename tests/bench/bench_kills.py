"""A run that is killed by SIGKILL, on a random rank at a random step and moment, and goes on.

Each continuation is compared with the run that was not killed: losses, every sample of every step, and the files of
the last checkpoint, bit for bit; where the number of ranks changes, the samples, and losses to 1e-5. A third of the
kills fall into the writing of a checkpoint.
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "integration"))

from kills import ANY_STEP, EVERY, SAVING, Kill, broken, curve, identical, latents, samples, whole

TITLE = f"Kills of a DiT run of 24 steps, a checkpoint every {EVERY}: what the continuation is, beside the run unbroken"
STEPS, KILLS, CHANGES = 24, 20, 4
RUNS = {"single": 1, "zero2": 2}
Row = dict[str, str]


def drawn(dice: random.Random, ranks: int) -> Kill:
    """Return a kill at a step after the first checkpoint."""
    rank = dice.randrange(ranks)
    if dice.random() < 1 / 3:
        return Kill(rank, dice.randrange(2 * EVERY, STEPS, EVERY), dice.choice(SAVING))
    return Kill(rank, dice.randrange(EVERY + 1, STEPS), dice.choice(ANY_STEP))


def row(strategy: str, kill: Kill, left: str, ended: float, result: str) -> Row:
    """Return what a kill led to."""
    return {
        "strategy": strategy,
        "step": str(kill.step),
        "rank": str(kill.rank),
        "moment": kill.moment,
        "goes on from": left.removeprefix("step-").lstrip("0"),
        "all ended after": f"{ended:.1f} s",
        "result": result,
    }


def kills(place: Path, data: str, strategy: str, ranks: int) -> list[Row]:
    """Return a row for each of a strategy's kills."""
    dice, rows = random.Random(f"{strategy}"), []
    how = {"strategy": strategy, "ranks": ranks, "max_steps": STEPS}
    unbroken = place / strategy
    whole(unbroken, data, **how)
    for number in range(KILLS):
        kill, out = drawn(dice, ranks), place / f"{strategy}-{number}"
        left, ended = broken(out, data, kill, **how)
        whole(out, data, attempt=2, **how)
        result = "bit-identical" if identical(unbroken, out) else "DIFFERENT"
        rows.append(row(f"{strategy}, {ranks} rank{'s' if ranks > 1 else ''}", kill, left, ended, result))
    return rows


def changes(place: Path, data: str) -> list[Row]:
    """Return rows of runs that are killed twice and go on with another number of ranks each time."""
    dice, rows = random.Random("changes"), []
    for number, (strategy, other) in enumerate(
        [("zero2", "single"), ("zero3", "single"), ("ddp", "zero2"), ("zero1", "zero3")][:CHANGES]
    ):
        unbroken, out = place / f"{strategy}-change", place / f"change-{number}"
        whole(unbroken, data, strategy=strategy, ranks=2, max_steps=STEPS)
        first = Kill(dice.randrange(2), dice.randrange(EVERY + 1, STEPS // 2), dice.choice(ANY_STEP))
        second = Kill(0, dice.randrange(STEPS // 2 + EVERY, STEPS), dice.choice(ANY_STEP))
        left, ended = broken(out, data, first, strategy=strategy, ranks=2, max_steps=STEPS)
        again, then = broken(out, data, second, strategy=other, ranks=1, max_steps=STEPS, attempt=2)
        whole(out, data, strategy=strategy, ranks=2, max_steps=STEPS, attempt=3)
        pairs = list(zip(curve(unbroken), curve(out), strict=True))
        worst = max(abs(float(b["loss"]) / float(a["loss"]) - 1) for a, b in pairs)
        same = "same samples in the same order" if samples(unbroken) == samples(out) else "OTHER SAMPLES"
        rows.append(row(f"{strategy}, 2 ranks", first, left, ended, "goes on with 1 rank"))
        rows.append(row(f"{other}, 1 rank", second, again, then, f"{same}; losses within {worst:.1e}"))
    return rows


def measure() -> list[Row]:
    """Return the table."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        data = latents(place / "latents")
        rows = [line for strategy, ranks in RUNS.items() for line in kills(place, data, strategy, ranks)]
        return rows + changes(place, data)
