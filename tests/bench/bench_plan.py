"""How long a plan takes from the manifest's parquet on, to jump in it, and the memory: the node's first process, and
the next one, which maps what the first has made."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

TITLE = "Plan over 1,024 ranks, from the manifest's parquet on"
RANKS, ROUNDS, PART, PER_SHARD = 1024, 3, 500_000, 400
JUMPS = (0, 1, 999, 123_456, 5_000_000)


def write(folder: Path, clips: int) -> None:
    """Write the manifest of `clips` clips, mixed as in a collection from the web, as data_prep would."""
    from bench_balance import mixed

    from soratrain.data.manifest import MANIFEST_SCHEMA

    manifest, draws = mixed(clips), np.random.default_rng(0)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    (folder / "manifest").mkdir(parents=True)
    for part, start in enumerate(range(0, clips, PART)):
        place, count = slice(start, start + PART), min(PART, clips - start)
        numbers, noise = np.arange(start, start + count), draws.integers(0, 256, (count, 16), dtype=np.uint8)
        keys = np.empty((count, 32), dtype=np.uint8)
        keys[:, ::2], keys[:, 1::2] = digits[noise >> 4], digits[noise & 15]
        offset, still = numbers % PER_SHARD * 1_000_000, manifest.image[place]
        columns = {name: getattr(manifest, name)[place] for name in ("w", "h", "frames", "fps_num", "fps_den")}
        columns |= {
            "key": pa.array(keys.view("S32").ravel().astype("U32")),
            "shard": pa.array([f"shard-{number:06d}.tar" for number in (numbers // PER_SHARD).tolist()]),
            "kind": pa.array(np.where(still, "image", "video")),
            "ext": pa.array(np.where(still, "jpg", "mp4")),
            "json_offset": offset,
            "json_length": np.full(count, 900),
            "media_offset": offset + 1024,
            "media_length": draws.integers(100_000, 900_000, count),
            "crc32": draws.integers(0, 2**32, count),
            "scores": pa.array(
                [f'{{"black":0.0,"motion":{value:.4f},"phash":"{value:.48f}"}}' for value in draws.random(count)]
            ),
        }
        table = pa.table([pa.array(columns[field.name], field.type) for field in MANIFEST_SCHEMA], MANIFEST_SCHEMA)
        pq.write_table(table, folder / "manifest" / f"part-{part:05d}.parquet", compression="zstd")


def once(folder: str) -> dict[str, float]:
    """Make the plan of a manifest and jump about in it."""
    from soratrain.data.buckets import Native
    from soratrain.data.budget import Budget
    from soratrain.data.mixing import assigned
    from soratrain.data.plan import Plan
    from soratrain.data.reading import read_manifest

    budget = Budget(tokens_per_batch=60_000, quadratic=1 / (6 * 2048))
    began = time.monotonic()
    manifest = read_manifest(folder)
    assignment = assigned(manifest, Native(max_size="1280x720", max_frames=121), budget, RANKS)
    plan = Plan(assignment=assignment, manifest=manifest, seed=0, budget=budget, canonical_ranks=RANKS)
    plan.state(0)
    made = time.monotonic() - began
    jumps = []
    for step in JUMPS:
        began = time.monotonic()
        plan.micro(step, 17)
        jumps.append(time.monotonic() - began)
    own, peak = memory("RssAnon"), memory("VmHWM")
    return {"made": made, "jump": max(jumps), "peak": peak, "own": own}


def memory(name: str) -> float:
    """Return a figure of this process in GiB; its peak from here, since getrusage's may be that of its parent."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) / 2**20


def measure() -> list[dict[str, str]]:
    """Return the table."""
    rows = []
    for clips in (1_000_000, 3_000_000, 10_000_000):
        with tempfile.TemporaryDirectory() as place:
            write(Path(place) / "data", clips)
            first, second = [], []
            for turn in range(ROUNDS):
                environment = os.environ | {"SORATRAIN_NODE_DIR": f"{place}/node{turn}"}
                for found in (first, second):
                    words = [sys.executable, __file__, f"{place}/data"]
                    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=True)
                    found.append(json.loads(done.stdout))
        for name, runs in (("the node's first", first), ("the next ones", second)):

            def shown(key: str, runs: list[dict[str, float]] = runs) -> str:
                values = [run[key] for run in runs]
                return f"{median(values):.2f} ({min(values):.2f}–{max(values):.2f})"

            rows.append(
                {
                    "clips": f"{clips:,}",
                    "process": name,
                    "plan, s": shown("made"),
                    "slowest jump, s": shown("jump"),
                    "peak memory with mapped files, GiB": shown("peak"),
                    "its own at the end, GiB": shown("own"),
                }
            )
    return rows


if __name__ == "__main__":
    sys.stdout.write(json.dumps(once(sys.argv[1])))
