"""The autoencoder `base` beside diffusers' AutoencoderKLWan at its published size: speed, parameters, memory."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from soratrain.models.vae import VAE

TITLE = "Video autoencoders on a CPU, fp32, two threads: one clip of 17x256x256; memory is what is added while it works"
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
    """Do `work` and send how much memory it added."""
    torch.set_num_threads(2)
    work(*arguments)
    sender.send(high_water() - before)


def added(work: Callable[..., None], *arguments: Any) -> float:
    """Return the MiB that `work` adds to a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=child, args=(sender, work, arguments))
    process.start()
    sender.close()
    found = receiver.recv()
    process.join()
    return found


def memory() -> list[dict[str, str]]:
    """Return what long clips take, streamed and in training."""
    rows = []
    for task in ("encode", "decode"):
        short, long = (added(stream, frames, task) for frames in (17, 129))
        note = f"129 frames {long:.0f} MiB, 17 frames {short:.0f} MiB"
        rows.append({"what": f"ours: {task}_stream of 128x128", "memory": f"{long / short:.2f} times", "note": note})
    for name, options in (
        ("plainly", {}),
        ("recompute=blocks", {"recompute": "blocks"}),
        ("recompute=levels", {"recompute": "levels"}),
        ("chunk_frames=16", {"chunk_frames": 16}),
        ("chunk_frames=16 recompute=blocks", {"chunk_frames": 16, "recompute": "blocks"}),
    ):
        found = {frames: added(train, frames, options) for frames in (17, 65, 129)}
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
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = speed() + memory() + tiles()
    finally:
        torch.set_num_threads(threads)
    columns = ("what", "parameters", "encode, frames/s", "decode, frames/s", "memory", "note")
    return [{name: row.get(name, "") for name in columns} for row in rows]
