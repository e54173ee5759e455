"""What stage=plan's cost model takes for granted, counted or measured on this machine: its constants, and the figures
of the device `cpu` in conf/stage/plan.yaml, one thread a process. What is cited or assumed of GPUs is said there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import torch
import torch.nn.functional as F

TITLE = "The constants of stage=plan's cost model, as they are used and as they are found here"
ROUNDS = 7
TOKENS, DIM, HEADS, LENGTH = 1728, 192, 3, 192  # a micro-batch of dit=tiny, and a clip of it
FAR = 1 << 26  # numbers that no cache holds
EXCHANGE = """
import sys, time, torch, torch.distributed as dist
torch.set_num_threads(1)
rank, port = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
buffer = torch.ones(1 << 24)
for turn in range(int(sys.argv[3]) + 1):
    dist.barrier()
    began = time.perf_counter()
    dist.all_reduce(buffer)
    if rank == 0 and turn:
        print(buffer.nbytes / (time.perf_counter() - began) / 1e9)
"""


def timed(work: Callable[[], object]) -> list[float]:
    """Return the seconds of each call but the first."""
    taken = []
    for _ in range(ROUNDS + 1):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return taken[1:]


def of_the_peak(work: Callable[[], object], done: float) -> list[float]:
    """Return the part of a square product's speed that `work`, so many operations, reaches; the two in turn."""
    from soratrain.stages.plan_device import measured_tflops

    found = []
    for _ in range(ROUNDS):
        peak = measured_tflops(False, seconds=0.2)[0] * 1e12
        found.append(done / min(timed(work)) / peak)
    return found


def products() -> list[float]:
    """Return the part of the peak that a block's products reach, forwards and backwards."""
    shapes = ((DIM, 3 * DIM), (DIM, DIM), (DIM, 3 * DIM), (3 * DIM, DIM))
    layers = [torch.nn.Linear(*shape) for shape in shapes]
    inputs = [torch.randn(TOKENS, shape[0], requires_grad=True) for shape in shapes]
    gradients = [torch.randn(TOKENS, shape[1]) for shape in shapes]

    def work() -> None:
        for layer, x, gradient in zip(layers, inputs, gradients, strict=True):
            layer(x).backward(gradient)

    done = 3 * 2 * TOKENS * sum(rows * columns for rows, columns in shapes)
    return of_the_peak(work, done)


def attention() -> list[float]:
    """Return the part of the peak that attention reaches, forwards and backwards, which are 2.5 times as much."""
    q, k, v = (torch.randn(TOKENS // LENGTH, HEADS, LENGTH, DIM // HEADS, requires_grad=True) for _ in range(3))
    gradient = torch.randn(q.shape)

    def work() -> None:
        F.scaled_dot_product_attention(q, k, v).backward(gradient)

    done = 3.5 * 4 * TOKENS * LENGTH * DIM
    return of_the_peak(work, done)


def memory() -> list[float]:
    """Return GB/s of an addition out of reach of caches: two numbers read, one written."""
    one, other = torch.ones(FAR), torch.ones(FAR)
    return [3 * one.nbytes / seconds / 1e9 for seconds in timed(lambda: one.add_(other))]


def launches(operations: int) -> list[float]:
    """Return microseconds of an operation in a DiT of so many to a block, on so few tokens that nothing else counts."""
    from counting import CHANNELS, TEXT

    from soratrain.diffusion.segments import Segment, flatten
    from soratrain.models.attention import Packing
    from soratrain.models.dit import DiT

    nets = [DiT(channels=CHANNELS, dim=48, depth=depth, num_heads=2, text_dim=TEXT) for depth in (2, 10)]
    tokens = flatten([[Segment(torch.randn(CHANNELS, 1, 4, 4), torch.tensor(0.5), 8.0)]], nets[0].patch).tokens
    text, packing = torch.randn(3, TEXT), Packing.of([3])
    few, many = (timed(lambda net=net: net(tokens, text, packing).sum().backward()) for net in nets)
    return [(more - less) / 8 / operations * 1e6 for less, more in zip(few, many, strict=True)]


def exchanged() -> list[float]:
    """Return GB/s that two processes of this machine send each other by gloo, one way."""
    port = str(20000 + os.getpid() % 20000)
    words = [[sys.executable, "-c", EXCHANGE, str(rank), port, str(ROUNDS)] for rank in (0, 1)]
    other = subprocess.Popen(words[1])
    found = subprocess.run(words[0], capture_output=True, text=True, check=True).stdout
    other.wait()
    return [float(line) for line in found.split()]


def measure() -> list[dict[str, str]]:
    """Return the table."""
    import yaml
    from counting import operations, passes

    from soratrain.schema import CONF
    from soratrain.stages.plan_device import described
    from soratrain.stages.plan_time import OPERATIONS, PASSES

    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    used = described(yaml.safe_load((CONF / "stage" / "plan.yaml").read_text())["stage"]["devices"], "cpu")
    rows: list[dict[str, str]] = []

    def add(constant: str, value: float, found: list[float], how: str) -> None:
        spread = f" ({min(found):.3g}–{max(found):.3g})" if len(found) > 1 else ""
        rows.append({"constant": constant, "used": f"{value:.3g}", "found": f"{median(found):.3g}{spread}", "how": how})

    for half, kind in ((True, "bf16"), (False, "fp32")):
        first, every = operations(half=half)
        forwards, both = passes(half=half)
        add(f"operations of a block, {kind}", OPERATIONS[half][1], [every], "counted: all that are no views")
        add(f"of them forwards, {kind}", OPERATIONS[half][0], [first], "")
        add(f"passes over what is kept, {kind}", PASSES[half][1], [both], "counted: bytes read and written")
        add(f"of them forwards, {kind}", PASSES[half][0], [forwards], "")
    add("cpu: matmul, of the peak", used.matmul, products(), f"{TOKENS} tokens of width {DIM}, fp32")
    add("cpu: attention, of the peak", used.attention, attention(), f"{LENGTH} tokens, {HEADS} heads, fp32")
    add("cpu: memory_gb_s", used.memory_gb_s, memory(), f"adding {FAR >> 20} Mi numbers in place")
    add("cpu: launch_us", used.launch_us, launches(OPERATIONS[False][1]), "blocks on 4 tokens of width 48")
    add("cpu: intra_gb_s", used.intra_gb_s, exchanged(), "gloo, 64 MiB summed over two processes")
    return rows
