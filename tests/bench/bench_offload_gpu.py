"""A DiT that does not fit one GPU: what stage=plan foretells of each strategy, and what becomes of it.

Its depth is such that weights, gradients, AdamW's moments and the copies in bf16 that are computed with, 18 bytes a
parameter, are more than the GPU has. Nothing that stays on the GPU takes less. zero3_offload keeps 24 in the host's
memory, which must have as much.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from statistics import median

import torch
from gpu_runs import Run, latents, train
from needs import MissingError, a_gpu

TITLE = "Training a DiT that does not fit one GPU, bf16, no average: zero3_offload beside others"
WAYS = ("ddp", "zero2", "zero3", "zero2_offload", "zero3_offload")
STEPS, WARM, BUCKET = 6, 2, 20_000_000
DIM, HEADS, PARAMETERS = 3072, 24, 16 * 3072**2  # of a block of width DIM: 4 D² to see, 4 to read, 8 to think
OVER, LEAST = 1.08, 18  # times the GPU's memory; bytes of a parameter there
SHAPE = (256, 256, 33)
WORDS = ("machine=gpu", "vae=base", "dit.recompute=full", "data.batch_size=1", "data.tokens_per_batch=null")


def depth_for(room: int) -> int:
    """Return the blocks of a DiT that does not fit into so many bytes."""
    return -(-int(OVER * room) // (LEAST * PARAMETERS))


def foretold(way: str, depth: int, *, dim: int = DIM, heads: int = HEADS, cuda: bool = True) -> tuple[float, float]:
    """Return GiB on the device and on the host that a rank holds, activations left out."""
    from soratrain.distributed.components import components
    from soratrain.distributed.memory import GIB
    from soratrain.distributed.options import StrategyOptions
    from soratrain.models.dit import DiT

    with torch.device("meta"):
        net = DiT(channels=16, dim=dim, depth=depth, num_heads=heads, text_dim=512)
    options = StrategyOptions(name=way, bucket=BUCKET)
    held = components([net], options, ranks=1, optimizer="adamw", average=False, half=True, cuda=cuda)
    return held.total(host=False) / GIB, held.total(host=True) / GIB


def row(way: str, told: tuple[float, float], run: Run) -> dict[str, str]:
    """Return a row of the table."""
    return {
        "strategy": way,
        "foretold, GiB of the GPU": f"{told[0]:.1f}",
        "and of the host": f"{told[1]:.1f}",
        "trains": f"no: {run.failed}" if run.failed else "yes",
        "peak, GiB of the GPU": "" if run.failed else f"{run.memory_gib:.1f}",
        "s/step": "" if run.failed else f"{median(run.seconds):.3g}",
    }


def tried(
    depth: int,
    *,
    cuda: bool,
    ways: tuple[str, ...] = WAYS,
    shape: tuple[int, int, int] = SHAPE,
    words: tuple[str, ...] = WORDS,
    dim: int = DIM,
    heads: int = HEADS,
) -> list[dict[str, str]]:
    """Return the table of a DiT of so many blocks."""
    size = (f"dit.dim={dim}", f"dit.depth={depth}", f"dit.num_heads={heads}")
    found = []
    with tempfile.TemporaryDirectory() as place:
        data = latents(Path(place), shape, clips=8)
        for way in ways:
            told = foretold(way, depth, dim=dim, heads=heads, cuda=cuda)
            words_of_it = [*words, *size, f"strategy={way}", f"strategy.bucket={BUCKET}", "trainer.ema=0"]
            found.append(row(way, told, train(Path(place) / way, data, words_of_it, steps=STEPS, warm=WARM, cuda=cuda)))
    return found


def measure() -> list[dict[str, str]]:
    """Return the table.

    Raises:
        MissingError: there is no GPU, or too little memory beside it.
    """
    a_gpu()
    depth = depth_for(torch.cuda.get_device_properties(0).total_memory)
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    if host < (needed := foretold("zero3_offload", depth)[1]):
        raise MissingError(
            f"what does not fit this GPU needs {needed:.0f} GiB of the host's memory, which has {host:.0f}"
        )
    return tried(depth, cuda=True)
