"""How fast a run goes and what holds it up: rates, use of the hardware, waiting, balance, memory, time left.

Nothing here makes a device wait but the end of a row of metrics, which waits for it anyway.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.distributed.memory import GIB
from soratrain.distributed.phases import Phases
from soratrain.errors import ConfigError

# dense bf16 TFLOP/s by what a GPU is called, from the makers' data sheets; the longest name that fits counts
PEAKS = {
    "GB200": 2500.0, "B200": 2250.0, "H200 NVL": 835.0, "H200": 989.0, "H100 NVL": 835.0, "H100 PCIe": 756.0,
    "H100": 989.0, "GH200": 989.0, "H800": 989.0, "H20": 148.0, "A100": 312.0, "A800": 312.0, "A40": 149.7,
    "A10G": 70.0, "A10": 125.0, "L40S": 362.0, "L40": 181.0, "L4": 121.0, "RTX 6000 Ada": 364.0, "RTX A6000": 154.8,
    "RTX 5090": 209.5, "RTX 4090": 165.2, "RTX 3090": 71.0, "MI300X": 1307.0, "MI325X": 1307.0,
}  # fmt: skip
# words of another card's name, or of a part of a card: MIG 1g.10gb, and vGPUs such as A100-10C, A40-48Q, A100-1-5CME
OTHERS = re.compile(r"Ti|SUPER|D|NVL|PCIe|PG\d+\w*|MIG|Laptop|Max-Q|\d+[ABCQ](?:4|ME)?", re.IGNORECASE)
WORK = ("flops", "tokens", "frames", "samples")  # by which the work of a rank's step is measured: the first there is
COLUMNS = ("seconds", "tokens_per_s", "samples_per_s", "mfu", "data_wait", "balance", "memory_gib", "seconds_left")


def peak_of(name: str) -> float | None:
    """Return the TFLOP/s of a GPU by its name; None of one that is not known, or is but named after a known one."""
    words = name.replace("-", " ").casefold()
    for part in sorted(PEAKS, key=len, reverse=True):
        if found := re.search(rf"(?<!\w){re.escape(part.casefold())}(?!\w)", words):
            rest = words[found.end() :].split()
            same = part in ("A100", "A800") and "pcie" in rest  # as fast, by the sheet
            return PEAKS[part] if same or not any(OTHERS.fullmatch(word) for word in rest) else None
    return None


class Throughput:
    """Measures the steps of a row.

    Args:
        phases: which know how long the steps have waited for the loader.
        peak_tflops: dense peak of one device; None takes that of a known GPU, and of no CPU.
    """

    def __init__(self, phases: Phases, peak_tflops: float | None = None) -> None:
        if peak_tflops is not None and peak_tflops <= 0:
            raise ConfigError(f"trainer.peak_tflops={peak_tflops}: must be above 0; null takes a known GPU's")
        self.phases, self.given = phases, peak_tflops
        self.began, self.waited = 0.0, 0.0
        self.work: list[float] = []  # of this rank, step by step
        self.seconds: float | None = None  # of a step, by the newest row

    def begin(self) -> None:
        """Begin a row now."""
        self.began, self.waited, self.work = time.monotonic(), self.phases.waited, []

    def note(self, values: Mapping[str, Tensor]) -> None:
        """Take note of what a step has reported."""
        key = next((key for key in WORK if key in values), None)
        self.work.append(float(values[key]) if key and values[key].device.type == "cpu" else 0.0)

    def row(self, means: Mapping[str, float], *, left: int, device: torch.device) -> dict[str, float]:
        """Return the row's columns; every rank calls it.

        Args:
            means: counts of a step over all ranks.
            left: steps that are still to come.
        """
        passed = max(time.monotonic() - self.began, 1e-9)
        seconds = self.seconds = passed / max(len(self.work), 1)
        ranks = self.gathered([self.phases.waited - self.waited, peak_memory(device), *self.work], device)
        found = {"seconds": seconds}
        found |= {f"{key}_per_s": means[key] / seconds for key in ("tokens", "samples") if key in means}
        peak = self.given or (peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None)
        if peak and "flops" in means:
            found["mfu"] = means["flops"] / seconds / (peak * 1e12 * len(ranks))
        found["data_wait"] = min(sum(rank[0] for rank in ranks) / len(ranks) / passed, 1.0)
        if "padded" in means:
            found["padding"] = means["padded"] / max(means["padded"] + means.get("tokens", 0.0), 1.0)
        most = sum(max(step) for step in zip(*(rank[2:] for rank in ranks), strict=True))
        if len(ranks) > 1 and most:
            found["balance"] = sum(sum(rank[2:]) for rank in ranks) / len(ranks) / most
        found["memory_gib"] = max(rank[1] for rank in ranks) / GIB
        found["seconds_left"] = seconds * left
        return found

    def seconds_left(self, steps: int) -> float | None:
        """Return how long so many steps will take, by the newest row; before the first, by its steps so far, if any."""
        if self.seconds is not None:
            return self.seconds * steps
        return (time.monotonic() - self.began) / len(self.work) * steps if self.work else None

    def gathered(self, values: list[float], device: torch.device) -> list[list[float]]:
        """Return every rank's numbers, of which each has as many."""
        if not (dist.is_initialized() and dist.get_world_size() > 1):
            return [values]
        table = torch.zeros(dist.get_world_size(), len(values), dtype=torch.float64, device=device)
        table[dist.get_rank()] = torch.tensor(values, dtype=torch.float64, device=device)
        dist.all_reduce(table)
        return table.tolist()


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that this process has had so far: allocated on its GPU, or in memory without one."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss) * (1 if sys.platform == "darwin" else 1024)
