"""Reading shards in a store: bytes fetched for bytes used, and speed beside plain WebDataset streaming.

8 nodes read cold, one after another, from a web server in a process of its own. Each node trains on every
eighth micro-batch of one epoch; WebDataset gives each node every eighth shard. Both have one process a node and read
raw bytes, since decoding would hide what is measured.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import webdataset

from soratrain.data.ahead import ReadAhead
from soratrain.data.buckets import Stored
from soratrain.data.budget import Budget
from soratrain.data.manifest import Manifest, write_manifest
from soratrain.data.members import open_shards, range_of, read_members
from soratrain.data.plan import Plan
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Range, Remote
from soratrain.data.shards import ShardWriter

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
TITLE = "Reading from a store: bytes fetched / used, and speed beside webdataset"
NODES, ROUNDS, BATCH, WINDOW = 8, 5, 16, 16
KINDS = {"clips, 0.4-2 MB": (400_000, 2_000_000, 240), "latents, 10-100 KB": (10_000, 100_000, 3200)}


def write(folder: Path, low: int, high: int, count: int) -> Manifest:
    """Write `count` samples of random bytes, sized between `low` and `high`, in 32 shards."""
    random, rows = np.random.default_rng(0), []
    with ShardWriter(folder, max_bytes=(low + high) // 2 * count // 32) as writer:
        for number in range(count):
            name, media = f"{number:032x}", random.bytes(int(random.integers(low, high)))
            head = json.dumps({"key": name, "captions": [{"type": "long", "text": "x" * 300}]}).encode()
            placed = writer.write(name, {"json": head, "safetensors": media})
            (a, b), (c, d) = placed.members["json"], placed.members["safetensors"]
            row: dict[str, Any] = dict(key=name, shard=placed.shard, kind="video", ext="safetensors", scores="{}")
            row |= dict(w=64, h=64, frames=17, fps_num=8, fps_den=1, crc32=zlib.crc32(media))
            rows.append(row | dict(json_offset=a, json_length=b, media_offset=c, media_length=d))
    write_manifest(folder, rows)
    return read_manifest(folder)


def serve(folder: str, pipe: Any) -> None:
    """Serve `folder`; answer each question in `pipe` with the bytes sent since the last."""
    from range_server import serving

    with serving(Path(folder)) as server:
        pipe.send(server.url)
        while pipe.recv():
            pipe.send(server.sent)
            server.sent = 0


def planned(manifest: Manifest) -> Plan:
    """Return the order in which eight ranks, one a node, read the samples."""
    assignment = Stored().assign(manifest, lambda bucket: BATCH * NODES)
    budget = Budget(batch_size=BATCH)
    return Plan(assignment=assignment, manifest=manifest, seed=0, budget=budget, canonical_ranks=NODES, window=WINDOW)


def ours(url: str, manifest: Manifest, cache: str | None, ahead: float = Remote.ahead_mb) -> tuple[int, float]:
    """Read one epoch as eight nodes; return the bytes of samples, and the seconds."""
    plan, used, began = planned(manifest), 0, time.monotonic()
    for node in range(NODES):
        remote = Remote(cache_dir=f"{cache}/{node}" if cache else None, ahead_mb=ahead)
        reader = open_shards(replace(manifest, folder=url), remote)
        assert isinstance(reader, ReadAhead)

        def samples(index: int, node: int = node) -> list[int]:
            return plan.local(index, node, NODES).samples.tolist()

        def wanted(index: int, samples: Callable[[int], list[int]] = samples) -> list[Range]:
            return [range_of(manifest.row(sample)) for sample in samples(index)]

        count = len(manifest) // (NODES * BATCH)
        for index in range(count):
            reader.reach(index, wanted, every=1, end=count)
            for sample in samples(index):
                header, media = read_members(reader, manifest.row(sample))
                used += len(media) + len(header)
        reader.close()
    return used, time.monotonic() - began


def theirs(url: str, manifest: Manifest) -> tuple[int, float]:
    """The same by streaming whole shards."""
    used, began = 0, time.monotonic()
    for node in range(NODES):
        urls = [f"pipe:curl -s {url}/{name}" for name in manifest.shards[node::NODES]]
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            header, media = json.loads(sample["json"]), sample["safetensors"]
            zlib.crc32(media)
            used += len(media) + len(header)
    return used, time.monotonic() - began


def spread(values: list[float], form: Callable[[float], str]) -> str:
    return f"{form(median(values))} ({form(min(values))}-{form(max(values))})"


def measure() -> list[dict[str, str]]:
    """Return a row for each kind of sample and way of reading."""
    rows, context = [], multiprocessing.get_context("spawn")
    for kind, (low, high, count) in KINDS.items():
        with tempfile.TemporaryDirectory() as place:
            manifest = write(Path(place) / "shards", low, high, count)
            here, there = context.Pipe()
            server = context.Process(target=serve, args=(f"{place}/shards", there), daemon=True)
            server.start()
            url, found = here.recv(), {}
            for turn in range(ROUNDS):
                ways = {
                    "ours, nothing ahead": lambda: ours(url, manifest, None, 0.0),  # noqa: B023 - called in this turn
                    "ours, ranges": lambda: ours(url, manifest, None),  # noqa: B023 - called in this turn
                    "ours, cache of chunks": lambda: ours(url, manifest, f"{place}/cache{turn}"),  # noqa: B023
                    "ours, its second epoch": lambda: ours(url, manifest, f"{place}/cache{turn}"),  # noqa: B023
                    "webdataset, streaming": lambda: theirs(url, manifest),  # noqa: B023
                }
                for name, way in ways.items():
                    used, seconds = way()
                    here.send(True)
                    found.setdefault(name, []).append((here.recv() / used, used / seconds / 1e6))
            here.send(False)
            server.join(10)
            base = [speed for _, speed in found["webdataset, streaming"]]
            for name, values in found.items():
                speeds = [speed for _, speed in values]
                rows.append(
                    {
                        "samples": kind,
                        "read by": name,
                        "fetched / used": spread([ratio for ratio, _ in values], "{:.2f}".format),
                        "MB/s": spread(speeds, "{:.0f}".format),
                        "speed / webdataset": f"{median(a / b for a, b in zip(speeds, base, strict=True)):.2f}",
                    }
                )
    return rows


if __name__ == "__main__":
    import pprint

    pprint.pp(measure(), width=160)
