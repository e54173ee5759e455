"""What the autoencoder takes of memory with the length of a clip, streamed and in training, and what tiles cost."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from bench_vae import ours, pixels
from torch import Tensor

TITLE = "The autoencoder's memory: what a process of its own adds while it works, fp32, two threads"


def stream(frames: int, task: str) -> None:
    """Encode or decode a long clip of 128x128 that is made frame by frame, as a stream of which nothing is kept."""
    vae = ours()

    def chunks() -> Iterator[Tensor]:
        for _ in range(frames if task == "encode" else 1 + (frames - 1) // 4):
            yield torch.rand((1, 3, 1, 128, 128)) if task == "encode" else torch.randn(1, 16, 1, 16, 16)

    run = vae.encode_stream if task == "encode" else vae.decode_stream
    begin()
    for _ in run(chunks()):
        pass


def train(frames: int, options: dict[str, Any]) -> None:
    """Go forwards and backwards over one clip of 64x64, size `s`."""
    vae, x = ours("s", **options), pixels(frames, 64)
    for parameter in vae.parameters():
        parameter.grad = torch.zeros_like(parameter)
    begin()
    vae.decode_chunk(vae.posterior(x)[0])[0].square().mean().backward()


def begin() -> None:
    """Let the peak that the kernel remembers of this process start from now."""
    global before
    Path("/proc/self/clear_refs").write_text("5")
    before = high_water()


before = 0.0


def high_water() -> float:
    """Return the most memory that this process has held, MiB."""
    text = Path("/proc/self/status").read_text()
    return int(text.split("VmHWM:")[1].split()[0]) / 1024


def child(sender: Connection, work: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Do `work` and send how much memory it added, and the process's own peak."""
    torch.set_num_threads(2)
    work(*arguments)
    sender.send((high_water() - before, high_water()))


def memory_of(work: Callable[..., None], *arguments: Any) -> tuple[float, float]:
    """Return the MiB that `work` adds to a process of its own, and all that the process held at its peak."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, work, arguments))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def memory() -> list[dict[str, str]]:
    """Return what long clips take, streamed and in training.

    A stream's 17 frames are a first one and one step of 16; from 33 on, a step's memory includes the state before it.
    """
    rows = []
    for task in ("encode", "decode"):
        peaks = {frames: memory_of(stream, frames, task) for frames in (17, 33, 129)}
        note = "; ".join(f"{frames} frames {more:.0f}, {whole:.0f} in all" for frames, (more, whole) in peaks.items())
        ratio = f"{peaks[129][1] / peaks[17][1]:.2f} times, weights and all; {peaks[129][0] / peaks[33][0]:.2f} without"
        rows.append({"what": f"ours: {task}_stream of 128x128", "memory": ratio, "note": f"MiB: {note}"})
    for name, options in (
        ("plainly", {}),
        ("recompute=blocks", {"recompute": "blocks"}),
        ("recompute=levels", {"recompute": "levels"}),
        ("chunk_frames=16", {"chunk_frames": 16}),
        ("chunk_frames=16 recompute=blocks", {"chunk_frames": 16, "recompute": "blocks"}),
    ):
        found = {frames: memory_of(train, frames, options)[0] for frames in (17, 65, 129)}
        note = ", ".join(f"{frames} frames {figure:.0f} MiB" for frames, figure in found.items())
        rows.append(
            {"what": f"ours: train s on 64x64, {name}", "memory": f"{found[129] / found[17]:.2f} times", "note": note}
        )
    return rows


def tiles() -> list[dict[str, str]]:
    """Return what cutting a picture of 1920x1088 into tiles costs."""
    with torch.device("meta"):
        vae = ours()
    rows = []
    for side in (128, 256, 512):
        found = []
        for task, space in (("encode", 1), ("decode", vae.stride[1])):
            place = torch.empty((1, 1, 1, 1088 // space, 1920 // space), device="meta")
            net = vae.tiles(f"{task}r", place, 4, 4 * side * side)
            assert net is not None
            found.append(f"{task} {net.overhead():.2f}")
        rows.append(
            {"what": f"ours: 1920x1088 in tiles of {side}x{side}", "note": "times the arithmetic: " + ", ".join(found)}
        )
    return rows


def measure() -> list[dict[str, str]]:
    """Return the table."""
    return [{name: row.get(name, "") for name in ("what", "memory", "note")} for row in memory() + tiles()]
