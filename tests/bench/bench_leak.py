"""Memory over 20,000 clips: a loader that leaks takes a machine down days into a run.

Real H.264 in several sizes, read from shards, decoded and stacked, over and over. What is measured is what nothing can
take back: anonymous and shared pages of the loader and all its workers (a page that several share counts once), not
the page cache. Each way runs in a process of its own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from fractions import Fraction
from pathlib import Path
from statistics import median

import numpy as np
import psutil

TITLE = "Memory of the loader and its workers, from clip 2,000 to clip 20,000 (a fifth of the measurements at each end)"
CLIPS, WARM, BATCH, LOOKS = 20_000, 2_000, 4, 50
SHAPES = [(64, 64, 9), (96, 64, 17), (64, 112, 9), (128, 80, 17), (96, 160, 13)]
DIFFERENT = 160  # clips in the shards
WAYS = {"in the training process": (0, 0), "2 workers": (2, 0), "2 workers, a cache that fills up": (2, 4 << 20)}


def memory() -> float:
    """Return the MiB that this process and its children hold."""
    total = 0
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        for line in Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total / 1024


def moving(height: int, width: int, frames: int, seed: int) -> np.ndarray:
    """Return coarse noise that drifts, uint8 `[T, H, W, 3]`."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    field = np.kron(small, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(field, (frame, 2 * frame), (0, 1)) for frame in range(frames)])


def write(folder: Path) -> None:
    """Write the clips as shards."""
    from data_tiny import fields, mp4
    from data_tiny import write as write_shards

    samples = []
    for number in range(DIFFERENT):
        shape = SHAPES[number % len(SHAPES)]
        samples.append((fields(*shape, "mp4"), mp4(moving(*shape, number), Fraction(8))))
    write_shards(folder, samples)


def once(folder: str, workers: int, cache: int) -> list[float]:
    """Load all clips; return the memory at points evenly spread over those after the warm-up."""
    from soratrain.data.buckets import Native
    from soratrain.data.datamodule import VideoData

    data = VideoData(
        shards=folder, buckets=Native(), seed=0, max_steps=10**6, batch_size=BATCH, workers=workers, cache=cache
    )
    found, pixels, at = [], 0, np.linspace(WARM, CLIPS, LOOKS).astype(int) // BATCH
    for number, batch in enumerate(data.loader(0, CLIPS // BATCH), 1):
        pixels += batch.video.numel()
        if number in at:
            found.append(memory())
    assert pixels
    return found


def measure() -> list[dict[str, str]]:
    """Return a row for each way of loading."""
    rows = []
    with tempfile.TemporaryDirectory() as place:
        write(Path(place))
        for name, (workers, cache) in WAYS.items():
            words = [sys.executable, __file__, place, str(workers), str(cache)]
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            found = json.loads(done.stdout)
            first, last = median(found[: LOOKS // 5]), median(found[-(LOOKS // 5) :])
            rows.append(
                {
                    "loaded": name,
                    "MiB at first": f"{first:.1f}",
                    "MiB at last": f"{last:.1f}",
                    "growth": f"{last / first - 1:+.2%}",
                    "least-most, MiB": f"{min(found):.1f}-{max(found):.1f}",
                }
            )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(once(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))))
