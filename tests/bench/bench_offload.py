"""AdamW's update on a CPU, where offload leaves it: torch's fused one beside DeepSpeed's, compiled on the spot."""

from __future__ import annotations

import os
import time
from statistics import median

NUMBERS, ROUNDS = 50_000_000, 9
TITLE = f"AdamW on a CPU over {NUMBERS // 10**6} million fp32 numbers, two threads: seconds an update"


def measure() -> list[dict[str, str]]:
    """Return the table; the two alternate."""
    import torch

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    torch.set_num_threads(2)
    settings = {"lr": 1e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}

    def holder() -> torch.nn.Parameter:
        made = torch.nn.Parameter(torch.randn(NUMBERS))
        made.grad = torch.randn(NUMBERS)
        return made

    ways = {"torch, fused (ours)": torch.optim.AdamW([holder()], fused=True, **settings)}
    began = time.perf_counter()
    try:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        ways["DeepSpeedCPUAdam"] = DeepSpeedCPUAdam([holder()], adamw_mode=True, **settings)
        note = f"its C++ made ready in {time.perf_counter() - began:.0f} s"
    except (RuntimeError, ImportError) as error:
        note = f"cannot be built here: {error}"
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, optimizer in ways.items():
            start = time.perf_counter()
            optimizer.step()
            taken[name].append(time.perf_counter() - start)
    rows = []
    for name, found in taken.items():
        least, *_, most = sorted(found[1:])
        rows.append({"update": name, "s": f"{median(found[1:]):.3f} ({least:.3f}–{most:.3f})", "note": ""})
    if len(rows) == 2:
        ratios = [ours / theirs for ours, theirs in zip(*(found[1:] for found in taken.values()), strict=True)]
        rows[0]["note"] = f"ours / theirs {median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})"
        rows[1]["note"] = note
    else:
        rows.append({"update": "DeepSpeedCPUAdam", "s": "", "note": note})
    return rows
