"""What it costs and saves that processes share the tokens of a long clip: the time of exchanges, a rank's memory.

A step goes forwards and backwards over one clip; gradients are there before, and are not averaged over ranks, since
that is the strategy's part and the same with and without. A rank has one thread, alone or beside another, so that two
ranks have twice the arithmetic. Processes of one machine exchange through its loopback, as gloo does.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from multiprocessing.connection import Connection
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from bench_vae_memory import begin, high_water
from torch import Tensor

from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed import sequence
from soratrain.distributed.memory import dit_activations
from soratrain.distributed.mesh import Mesh
from soratrain.distributed.sequence import Ulysses, share
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

DIM, DEPTH, HEADS, RATIO, CHANNELS, TEXT, WORDS = 384, 4, 4, 4, 16, 512, 64
TITLE = (
    f"A DiT's tokens shared by two processes on a CPU, fp32, a thread each, forwards and backwards: {DEPTH} blocks of"
    f" width {DIM}, {HEADS} heads, MLP x{RATIO}"
)
ROUNDS = 3
CLIPS = {"33 frames of 256x256": (9, 32, 32), "65 frames of 256x256": (17, 32, 32)}  # latents (t, h, w)


def tokens(shape: tuple[int, int, int]) -> int:
    """Return the tokens of a latent."""
    return shape[0] * shape[1] * shape[2] // 4


class Clock:
    """Adds up the time of exchanges, and what is waited for in them."""

    def __init__(self) -> None:
        self.spent, self.real = 0.0, sequence._all_to_all
        sequence._all_to_all = self  # type: ignore[assignment]

    def __call__(self, x: Tensor, group: Any) -> Tensor:
        began = time.perf_counter()
        out = self.real(x, group)
        self.spent += time.perf_counter() - began
        return out


def one_rank(rank: int, size: int, port: int, sender: Connection, shape: tuple[int, int, int], recompute: str) -> None:
    """Send seconds of each step, those of its exchanges, and the MiB that the first adds."""
    torch.set_num_threads(1)
    clock = Clock()
    torch.manual_seed(0)
    net = DiT(
        channels=CHANNELS, dim=DIM, depth=DEPTH, num_heads=HEADS, text_dim=TEXT, mlp_ratio=RATIO, recompute=recompute
    )
    if size > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size)
        share(net, Ulysses.joined(Mesh(rank, size, size)))
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step(shape: tuple[int, int, int]) -> None:
        latent = torch.randn((CHANNELS, *shape), generator=torch.Generator().manual_seed(0))
        flat = flatten([[Segment(latent, torch.tensor(0.5), 24.0)]], net.patch)
        net(flat.tokens, torch.ones(WORDS, TEXT), Packing((WORDS,))).square().mean().backward()

    step((1, 8, 8))  # what a process sets up once
    begin()
    took = []
    for _ in range(ROUNDS):
        clock.spent, began = 0.0, time.perf_counter()
        step(shape)
        took.append((time.perf_counter() - began, clock.spent))
    from bench_vae_memory import before

    sender.send((took, high_water() - before))


def ranks(size: int, shape: tuple[int, int, int], recompute: str) -> tuple[list[float], list[float], float]:
    """Return seconds of each step, the share of exchanges in it, and the MiB that a rank's step adds."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    context, found, processes = multiprocessing.get_context("spawn"), [], []
    for rank in range(size):
        receiver, sender = context.Pipe(duplex=False)
        arguments = (rank, size, port, sender, shape, recompute)
        processes.append(context.Process(target=one_rank, args=arguments))
        processes[-1].start()
        sender.close()
        found.append(receiver)
    answers = [receiver.recv() for receiver in found]
    for process in processes:
        process.join()
    took = answers[0][0]
    return [whole for whole, _ in took], [part / whole for whole, part in took], max(held for _, held in answers)


def measure() -> list[dict[str, str]]:
    """Return the table."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "262144"  # what is freed is gone, and not kept in the heap's holes
    rows = []
    for name, shape in CLIPS.items():
        for recompute in ("none", "full"):
            alone, _, most = ranks(1, shape, recompute)
            for size in (1, 2):
                took, shares, held = (alone, [0.0], most) if size == 1 else ranks(2, shape, recompute)
                told = dit_activations(
                    tokens=-(-tokens(shape) // size),
                    dim=DIM,
                    depth=DEPTH,
                    mlp_ratio=RATIO,
                    itemsize=4,
                    recompute=recompute,
                    shared=size > 1,
                )
                row = {"clip": f"{name}: {tokens(shape):,} tokens", "recompute": recompute, "ranks": str(size)}
                row["s a step"] = f"{median(took):.2f} ({min(took):.2f}–{max(took):.2f})"
                row["in exchanges"] = f"{median(shares):.1%}" if size > 1 else ""
                row["against one rank"] = f"{median(alone) / median(took):.2f} times as fast" if size > 1 else ""
                row["memory of a rank"] = f"{held:,.0f} MiB" + (f", {held / most:.0%}" if size > 1 else "")
                rows.append(row | {"foretold": f"{told / 2**20:,.0f} MiB"})
    return rows
