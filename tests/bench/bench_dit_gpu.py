"""Model FLOP utilisation of `dit=l` in training on one CUDA GPU, bf16, blocks compiled.

Counted as `forward_flops` says, three times for a step: attention within clips only, nothing for what is computed
twice or for padding. `bucket`: clips of one length; `pack`: the same number of tokens in clips of unequal ones.
"""

from __future__ import annotations

import time
from pathlib import Path
from statistics import median

import torch
import yaml
from needs import a_gpu

from soratrain.callbacks.compiled import compile_blocks
from soratrain.callbacks.throughput import peak_of
from soratrain.diffusion.segments import Segment, flatten
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT
from soratrain.stages.plan_cost import forward_flops

TITLE = "dit=l on one GPU, bf16, forwards and backwards: share of the chip's dense bf16 peak"
CONF = Path(__file__).resolve().parents[2] / "conf" / "dit"
CHANNELS, TEXT, WORDS = 16, 512, 128
WARM, ROUNDS = 4, 8
# Latents (t, h, w) by tokens of the step: equal clips, and clips of unequal length with as many tokens in all.
SETS = {
    8_192: ([(8, 64, 64)], [(4, 64, 64), (2, 64, 64), (1, 64, 64), (1, 32, 64), (1, 32, 64)]),
    32_768: ([(8, 64, 64)] * 4, [(20, 64, 64), (8, 64, 64), (3, 64, 64), (1, 64, 64)]),
    75_776: ([(37, 64, 128)], [(30, 64, 128), (5, 64, 128), (1, 64, 128), (1, 32, 128), (1, 32, 128)]),
}


def build(recompute: str) -> DiT:
    """Return the net on the GPU, its blocks compiled; with `selective`, which the compiler would undo, they are not."""
    spec = yaml.safe_load((CONF / "l.yaml").read_text())
    spec = {key: value for key, value in spec.items() if not key.startswith("_")}
    torch.manual_seed(0)
    with torch.device("cuda"):
        net = DiT(**{**spec, "channels": CHANNELS, "text_dim": TEXT, "recompute": recompute})
    if recompute != "selective":
        compile_blocks(net)
    return net


def row(net: DiT, shapes: list[tuple[int, int, int]]) -> dict[str, str]:
    """Return seconds a step, operations a second and memory over clips of these shapes."""
    with torch.device("cuda"):
        segments = [Segment(torch.randn(CHANNELS, *shape), torch.tensor(0.5), 24.0) for shape in shapes]
        text = torch.randn(WORDS * len(shapes), TEXT)
    packing = Packing.of([WORDS] * len(shapes))
    tokens = flatten([[segment] for segment in segments], net.patch).tokens
    took = []
    torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM + ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            out = net(tokens, text, packing)
        out.float().square().mean().backward()
        torch.cuda.synchronize()
        took.append(time.perf_counter() - began)
        net.zero_grad()
    took = took[WARM:]
    rate = [3 * forward_flops(net, tokens.packing.lengths, packing.lengths)[0] / one for one in took]
    found = {"s/step": f"{median(took):.3f}", "TFLOP/s": f"{median(rate) / 1e12:.0f}"}
    if most := peak_of(torch.cuda.get_device_name()):
        share = [100 * value / (most * 1e12) for value in rate]
        found["utilisation"] = f"{median(share):.1f} % ({min(share):.1f}–{max(share):.1f})"
    return found | {"memory": f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"}


def measure() -> list[dict[str, str]]:
    """Return the table."""
    a_gpu()
    columns = ("tokens", "clips", "recompute", "s/step", "TFLOP/s", "utilisation", "memory", "note")
    rows: list[dict[str, str]] = []
    for recompute in ("none", "selective", "full"):
        net = build(recompute)
        for count, sets in SETS.items():
            for kind, shapes in zip(("bucket", "pack"), sets, strict=True):
                said = {"tokens": f"{count:,}", "clips": f"{kind} of {len(shapes)}", "recompute": recompute}
                try:
                    rows.append(said | row(net, shapes))
                except torch.cuda.OutOfMemoryError:
                    rows.append(said | {"note": "does not fit this GPU"})
                    net.zero_grad()
        del net
        torch.cuda.empty_cache()
    return [{name: row.get(name, "") for name in columns} for row in rows]
