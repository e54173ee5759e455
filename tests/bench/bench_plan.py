"""How long a plan takes to make and to jump in, and the memory that takes, each size in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

TITLE = "Plan over 1,024 ranks, from columns in memory (reading the manifest's parquet is not in it)"
RANKS, ROUNDS = 1024, 3
JUMPS = (0, 1, 999, 123_456, 5_000_000)


def once(clips: int) -> dict[str, float]:
    """Make a plan for `clips` clips and jump about in it."""
    from bench_balance import mixed

    from soratrain.data.assignment import Bucket
    from soratrain.data.buckets import Native
    from soratrain.data.budget import Budget
    from soratrain.data.plan import Plan

    manifest = mixed(clips)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    budget = Budget(tokens_per_batch=60_000, quadratic=1 / (6 * 2048))

    def block(bucket: Bucket) -> int:
        return budget.samples(bucket) * RANKS

    began = time.monotonic()
    assignment = Native(max_size="1280x720", max_frames=121).assign(manifest, block, RANKS)
    plan = Plan(assignment=assignment, manifest=manifest, seed=0, budget=budget, canonical_ranks=RANKS)
    plan.state(0)
    made = time.monotonic() - began
    jumps = []
    for step in JUMPS:
        began = time.monotonic()
        plan.micro(step, 17)
        jumps.append(time.monotonic() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"made": made, "jump": max(jumps), "gib": peak / 2**20, "columns": before / 2**20}


def measure() -> list[dict[str, str]]:
    """Return the table."""
    rows = []
    for clips in (1_000_000, 3_000_000, 10_000_000):
        runs = []
        for _ in range(ROUNDS):
            words = [sys.executable, __file__, str(clips)]
            folder = Path(__file__).resolve().parent
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            runs.append(json.loads(done.stdout))

        def shown(name: str, runs: list[dict[str, float]] = runs) -> str:
            values = [run[name] for run in runs]
            return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

        rows.append(
            {
                "clips": f"{clips:,}",
                "plan, s": shown("made"),
                "slowest jump, s": shown("jump"),
                "peak memory, GiB": shown("gib"),
                "of it the columns": shown("columns"),
            }
        )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(once(int(sys.argv[1]))))
