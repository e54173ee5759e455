"""How much memory is free, where something would take more than it must."""

from __future__ import annotations

import os
from pathlib import Path

import torch

CGROUPS = (  # limit and use of a container
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def available(device: torch.device) -> int:
    """Return the bytes that are free on a device, within what a container allows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        free += [int(line.split()[1]) * 1024 for line in meminfo.read_text().splitlines() if "MemAvailable" in line]
    for limit, use in CGROUPS:
        if Path(limit).is_file() and Path(use).is_file() and (allowed := Path(limit).read_text().strip()) != "max":
            free.append(int(allowed) - int(Path(use).read_text()) + _cached(Path(use).with_name("memory.stat")))
    return max(min(free), 0)


def _cached(file: Path) -> int:
    """Return the bytes of files that a container holds in memory, which it gives back when asked."""
    lines = [line.split() for line in file.read_text().splitlines()] if file.is_file() else []
    return sum(int(value) for name, value in lines if name.removeprefix("total_") in ("active_file", "inactive_file"))
