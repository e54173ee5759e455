"""What two processes save that encode a long clip together, each a part of it with what lies around.

A process has one thread, alone or beside another, so that two have twice the arithmetic. It has the clip's frames at
hand: decoding, of which each does its own frames, comes on top.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from multiprocessing.connection import Connection
from statistics import median

import bench_vae_memory
import numpy as np
import torch
from bench_vae import ours
from bench_vae_memory import begin, high_water

from soratrain.data.assignment import Bucket
from soratrain.stages.encoding import ClipEncoder
from soratrain.stages.encoding_parts import Part, divide

TITLE = "A long clip encoded by two processes on a CPU, fp32, a thread each, size `s`, 2^19 pixels at once"
ROUNDS = 3
CLIPS = {"161 frames of 128x128": Bucket(128, 128, 161), "33 frames of 384x256": Bucket(256, 384, 33)}


def one(place: int, parts: list[Part], bucket: Bucket, sender: Connection, receiver: Connection) -> None:
    """Encode the clip, or a part of it, whenever told to; send seconds, and in the end the MiB that it added."""
    torch.set_num_threads(1)
    vae, cpu = ours("s").eval(), torch.device("cpu")
    encode = ClipEncoder(tail_frames=[1, 5], dtype="bf16", pixels_per_batch=1 << 19, autocast=False)
    part = parts[place] if parts else None
    size = [edge.stop - edge.start for edge in part.pixels] if part else (bucket.frames, bucket.height, bucket.width)
    video = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    encode(vae, [video[:5, :64, :64]], cpu)  # what a process sets up once
    begin()
    while receiver.recv():
        began = time.perf_counter()
        encode(vae, [video], cpu, part)
        sender.send(time.perf_counter() - began)
    sender.send(high_water() - bench_vae_memory.before)


def times(bucket: Bucket, ways: dict[int, list[Part]]) -> dict[int, tuple[list[float], float]]:
    """Return the seconds until the last process is done, ways taking turns, and the most MiB that one added."""
    context, found = multiprocessing.get_context("spawn"), {}
    running = {}
    for count, parts in ways.items():
        running[count] = []
        for place in range(count):
            (hear, say), (listen, tell) = context.Pipe(duplex=False), context.Pipe(duplex=False)
            process = context.Process(target=one, args=(place, parts, bucket, say, listen))
            process.start()
            running[count].append((process, hear, tell))
    took: dict[int, list[float]] = {count: [] for count in ways}
    for number in range(ROUNDS + 1):
        for count, processes in running.items():
            for _, _, tell in processes:
                tell.send(True)
            seconds = max(hear.recv() for _, hear, _ in processes)
            took[count] += [seconds] if number else []  # the first round warms up
    for count, processes in running.items():
        for _, _, tell in processes:
            tell.send(False)
        found[count] = took[count], max(hear.recv() for _, hear, _ in processes)
        for process, _, _ in processes:
            process.join()
    return found


def measure() -> list[dict[str, str]]:
    """Return the table."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # what is freed is gone, and not kept in the heap's holes
    rows = []
    for name, bucket in CLIPS.items():
        parts = divide(ours("s"), bucket, 2, [1, 5])
        whole = bucket.frames * bucket.height * bucket.width
        read = [np.prod([edge.stop - edge.start for edge in part.pixels]) for part in parts]
        found = times(bucket, {1: [], 2: parts})
        (alone, most), (both, held) = found[1], found[2]
        for count, (took, memory) in found.items():
            row = {"clip": name, "processes": str(count)}
            row["largest part"] = f"{max(read) / whole:.0%}" if count > 1 else ""
            row["s a clip"] = f"{median(took):.2f} ({min(took):.2f}–{max(took):.2f})"
            row["against one"] = f"{median(alone) / median(both):.2f} times as fast" if count > 1 else ""
            row["memory of a process"] = f"{memory:,.0f} MiB" + (f", {held / most:.0%}" if count > 1 else "")
            rows.append(row)
    return rows
