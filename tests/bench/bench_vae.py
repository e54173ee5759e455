"""The autoencoder `base` beside diffusers' AutoencoderKLWan at its published size: speed and parameters."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from soratrain.models.vae import VAE

TITLE = "Video autoencoders on a CPU, fp32, two threads: one clip of 17x256x256"
ROUNDS, FRAMES, SIDE = 3, 17, 256
PUBLISHED = dict(base_dim=96, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=2)  # Wan 2.1
CONF = Path(__file__).resolve().parents[2] / "conf" / "vae"
ORDERS = ("channels first", "channels last")


def ours(size: str = "base", **options: Any) -> VAE:
    """Return a published size of ours."""
    spec = {**yaml.safe_load((CONF / f"{size}.yaml").read_text()), **options}
    torch.manual_seed(0)
    return VAE(**{key: value for key, value in spec.items() if not key.startswith("_")}).eval()


def theirs() -> nn.Module:
    """Return Wan's at its published size. Raises ImportError where diffusers is not installed."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(**PUBLISHED).eval()


def pixels(frames: int = FRAMES, side: int = SIDE) -> Tensor:
    """Return a clip of noise."""
    return torch.rand((1, 3, frames, side, side), generator=torch.Generator().manual_seed(0)) * 2 - 1


def seconds(run: Callable[[], object]) -> float:
    """Return how long `run` takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def ways(net: nn.Module, x: Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed of a network, by name."""
    latent = torch.randn((1, 16, 1 + (x.shape[2] - 1) // 4, x.shape[3] // 8, x.shape[4] // 8))
    return {"encode": lambda: net.encode(x), "decode": lambda: net.decode(latent)}  # type: ignore[operator]


def laid(net: nn.Module, order: str) -> nn.Module:
    """Return a network with its convolutions' weights in an order of memory."""
    last = {5: torch.channels_last_3d, 4: torch.channels_last}
    for weight in net.parameters():
        form = last.get(weight.dim()) if order == "channels last" else None
        weight.data = weight.data.contiguous(memory_format=form or torch.contiguous_format)
    return net


def ordered(net: nn.Module) -> tuple[nn.Module, str]:
    """Return a network in the order of memory in which it encodes and decodes a small clip faster, and its name."""
    took = {}
    for order in ORDERS:
        small = ways(laid(net, order), pixels(5, 64))
        took[order] = min(sum(seconds(run) for run in small.values()) for _ in range(3))
    best = min(took, key=took.__getitem__)
    return laid(net, best), best


@torch.inference_mode()
def speed() -> list[dict[str, str]]:
    """Return frames a second of both, measured in turn."""
    nets = {"ours: base": ours()}
    notes = {"ours: base": ""}
    try:
        nets["diffusers: AutoencoderKLWan"], notes["diffusers: AutoencoderKLWan"] = ordered(theirs())
    except ImportError:
        notes["diffusers: AutoencoderKLWan"] = "diffusers is not installed"
    x = pixels()
    runs = {name: ways(net, x) for name, net in nets.items()}
    took: dict[tuple[str, str], list[float]] = {}
    for task in ("encode", "decode"):
        for _ in range(ROUNDS):
            for name in nets:
                took.setdefault((name, task), []).append(FRAMES / seconds(runs[name][task]))
    rows = []
    for name, note in notes.items():
        row = {"what": name, "note": note}
        if name in nets:
            row["parameters"] = f"{sum(p.numel() for p in nets[name].parameters()):,}"
            for task in ("encode", "decode"):
                figures = took[name, task]
                row[f"{task}, frames/s"] = f"{median(figures):.2f} ({min(figures):.2f}–{max(figures):.2f})"
        rows.append(row)
    if len(nets) == 2:
        ratios = {"what": "ours / theirs, median (least–most) of the rounds"}
        for task in ("encode", "decode"):
            figures = [a / b for a, b in zip(*(took[name, task] for name in nets), strict=True)]
            ratios[f"{task}, frames/s"] = f"{median(figures):.2f} ({min(figures):.2f}–{max(figures):.2f})"
        rows.append(ratios)
    return rows


def measure() -> list[dict[str, str]]:
    """Return the table."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = speed()
    finally:
        torch.set_num_threads(threads)
    columns = ("what", "parameters", "encode, frames/s", "decode, frames/s", "note")
    return [{name: row.get(name, "") for name in columns} for row in rows]
