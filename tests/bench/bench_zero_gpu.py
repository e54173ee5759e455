"""zero1 and zero2 on one GPU beside plain DDP: seconds of a step, in turn, each run in a process of its own.

With one rank there is nothing to shard, so what ZeRO takes longer is what it costs by itself. Asked is at most 5 %.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from statistics import median

from gpu_runs import latents, train
from needs import a_gpu

TITLE = "A training step of dit=b on one GPU, bf16: zero1 and zero2 beside ddp"
WAYS = ("ddp", "zero1", "zero2")
ROUNDS, STEPS, WARM, MOST = 5, 30, 10, 1.05
SHAPE = (256, 256, 33)  # pixels and frames: 2,304 tokens a clip
WORDS = ("machine=gpu", "dit=b", "vae=base", "trainer.compile=none", "data.tokens_per_batch=18432", "data.quadratic=0")


def rows(taken: dict[str, list[list[float]]]) -> list[dict[str, str]]:
    """Return the table of each way's seconds, run by run; ratios are of neighbours in a round."""
    found = []
    for way, runs in taken.items():
        each = [median(seconds) for seconds in runs]
        ratios = [one / other for one, other in zip(each, map(median, taken["ddp"]), strict=True)]
        kept = "" if way == "ddp" else "yes" if median(ratios) <= MOST else "no"
        found.append(
            {
                "strategy": way,
                "s/step": f"{median(each):.4g} ({min(each):.4g}–{max(each):.4g})",
                "by ddp": f"{median(ratios):.3f} ({min(ratios):.3f}–{max(ratios):.3f})",
                "at most 1.05": kept,
            }
        )
    return found


def turns(
    *, cuda: bool, rounds: int, steps: int, warm: int, shape: tuple[int, int, int], words: tuple[str, ...]
) -> list[dict[str, str]]:
    """Return the table of as many rounds, in each of which every way has its turn; the order turns too.

    Raises:
        RuntimeError: a run failed; says why.
    """
    taken: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as place:
        data = latents(Path(place), shape)
        for turn in range(rounds):
            for way in WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]:
                run = train(Path(place) / way, data, [*words, f"strategy={way}"], steps=steps, warm=warm, cuda=cuda)
                if run.failed:
                    raise RuntimeError(f"strategy={way}: {run.failed}")
                taken[way].append(run.seconds)
    return rows(taken)


def measure() -> list[dict[str, str]]:
    """Return the table."""
    a_gpu()
    return turns(cuda=True, rounds=ROUNDS, steps=STEPS, warm=WARM, shape=SHAPE, words=WORDS)
