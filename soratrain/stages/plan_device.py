"""What a step is computed on: peaks, bandwidths and what of them is reached, each with where it is from.

A figure is a number, or a number and its source. Who sets one on the command line gives the number, and the source of
the old one goes with it. A device of one's own begins like another: `+stage.devices.b200={like:h100,bf16_tflops:2250}`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.schema import suggest

GIVEN = "as given"  # the source of a number that comes without one
MAY_BE_0 = ("hidden", "launch_us")
MEASURED = ("bf16_tflops", "fp32_tflops")  # where they are 0, which they may be of a CPU
SHARES = ("matmul", "attention", "hidden")
SAID = {  # of the figures that a time rests on
    "bf16_tflops": "peak in bf16, TFLOP/s",
    "fp32_tflops": "peak in fp32, TFLOP/s",
    "matmul": "of it, what large products reach",
    "attention": "of it, what attention reaches",
    "memory_gb_s": "memory, GB/s",
    "intra_gb_s": "from GPU to GPU within a node, GB/s",
    "inter_gb_s": "from a node to another, GB/s",
    "host_gb_s": "from GPU to host, GB/s",
    "host_memory_gb_s": "the host's memory, for each GPU, GB/s",
    "hidden": "of computing, what messages can hide under",
    "launch_us": "least time of an operation, microseconds",
}


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a step is computed on.

    Attributes:
        bf16_tflops, fp32_tflops: peak of dense products; 0 of a CPU, where it is to be measured here.
        matmul, attention: the part of it that large products, and attention forwards and backwards, reach. One part
            for both kinds of numbers: in fp32 that of bf16 is assumed, where it was found in bf16.
        memory_gib: of a device.
        memory_gb_s: its bandwidth.
        intra_gb_s: between two devices of a node, one way.
        inter_gb_s: from a node to another, one way, all of its cards together.
        host_gb_s: from a device to its host, one way.
        host_memory_gb_s: of the host's memory, for each device.
        per_node: devices.
        hidden: the part of computing under which messages can hide.
        launch_us: time of an operation however small it is.
        sources: of these, by name; what has none was given by whoever asks.
    """

    bf16_tflops: float
    fp32_tflops: float
    matmul: float
    attention: float
    memory_gib: float
    memory_gb_s: float
    intra_gb_s: float
    inter_gb_s: float
    host_gb_s: float
    host_memory_gb_s: float
    per_node: int
    hidden: float
    launch_us: float
    sources: Mapping[str, str] = field(default_factory=dict)

    def peak(self, half: bool) -> float:
        """Return operations a second."""
        return (self.bf16_tflops if half else self.fp32_tflops) * 1e12


FIGURES = tuple(item.name for item in fields(Device) if item.name != "sources")


def device_of(
    devices: Mapping[str, Mapping[str, Any]], name: str, half: bool, *, ranks: int = 1, nodes: int | None = None
) -> tuple[Device, int]:
    """Return the device called `name` and the nodes; a peak that is not said is measured here, within a second.

    Args:
        devices: figures by device; any of them may be wrong, and is refused.
        half: whether the peak in bf16 counts, not that in fp32.
        ranks: devices of a run.
        nodes: that they are on; None: as few as hold them. What is measured here is shared by the ranks of one.

    Raises:
        ConfigError: there is none of that name, or a value is out of range.
    """
    found = {each: described(devices, each) for each in devices}
    if name not in found:
        raise ConfigError(
            f"stage.device={name} is not there; use one of {', '.join(devices)}, or add it:"
            f" '+stage.devices.{name}={{like:{next(iter(devices), 'h100')},bf16_tflops:…,memory_gib:…}}'"
        )
    device = found[name]
    nodes = nodes or -(-ranks // device.per_node)
    if device.peak(half):
        return device, nodes
    speed, said = measured_tflops(half, ranks=-(-ranks // nodes))
    key = "bf16_tflops" if half else "fp32_tflops"
    return replace(device, **{key: speed, "sources": {**device.sources, key: said}}), nodes  # type: ignore[arg-type]


def on_gpu(devices: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Return whether a device is a GPU: every one but `cpu` and those that begin like it."""
    seen: set[str] = set()
    while name != "cpu" and name not in seen and isinstance(given := devices.get(name), Mapping) and given.get("like"):
        seen.add(name)
        name = str(given["like"])
    return name != "cpu"


def described(devices: Mapping[str, Mapping[str, Any]], name: str, after: tuple[str, ...] = ()) -> Device:
    """Return a device as its figures say, with those of the one that it is `like` where it has none of its own.

    Raises:
        ConfigError: names the figure and the mend.
    """
    key, given, gpu = f"stage.devices.{name}", devices[name], on_gpu(devices, name)
    if not isinstance(given, Mapping):
        raise ConfigError(f"{key}={given!r}: must hold figures by name, {{like: h100, bf16_tflops: 2250}} say")
    values: dict[str, float] = {}
    sources: dict[str, str] = {}
    if (like := given.get("like")) is not None:
        if not isinstance(like, str) or like not in devices or like in (name, *after):
            others = [other for other in devices if other not in (name, *after)]
            raise ConfigError(f"{key}.like={like}: must be another device: {', '.join(others)}")
        model = described(devices, like, (name, *after))
        values = {figure: getattr(model, figure) for figure in FIGURES}
        sources = {figure: f"as {like}: {model.sources.get(figure, GIVEN)}" for figure in FIGURES}
    for figure, value in given.items():
        if figure == "like":
            continue
        if figure not in FIGURES:
            raise ConfigError(f"{key}.{figure}={value!r}: no such figure; {suggest(str(figure), ('like', *FIGURES))}")
        values[figure], sources[figure] = checked(f"{key}.{figure}", figure, value, gpu)
    if lacking := [figure for figure in FIGURES if figure not in values]:
        raise ConfigError(f"{key}: lacks {', '.join(lacking)}; give them, or like: h100 to take them from another")
    whole = {"per_node": int(values["per_node"])}
    return Device(**{**values, **whole}, sources=sources)  # type: ignore[arg-type]


def checked(key: str, figure: str, value: Any, gpu: bool) -> tuple[float, str]:
    """Return a figure, of a GPU or not, and its source.

    Raises:
        ConfigError: it is no number, or none that can be.
    """
    number, source = value if isinstance(value, list | tuple) and len(value) == 2 else (value, GIVEN)
    if isinstance(number, bool) or not isinstance(number, int | float) or not isinstance(source, str):
        raise ConfigError(f"{key}={value!r}: must be a number, or a number and its source")
    if number == 0 and gpu and figure in MEASURED:
        raise ConfigError(f"{key}={number}: must be positive; 0, measured here, is for cpu and what is like it")
    if not number >= 0 or number == float("inf") or (number == 0 and figure not in MAY_BE_0 + MEASURED):
        raise ConfigError(f"{key}={number}: must be positive")
    if figure in SHARES and number > 1:
        raise ConfigError(f"{key}={number}: is a share, at most 1")
    if figure == "per_node" and number != int(number):
        raise ConfigError(f"{key}={number}: must be a whole number")
    return number, source


def threads_of_a_rank(ranks: int) -> tuple[int, float]:
    """Return the threads of one of `ranks` processes of this host, and the share of each that cores have for it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    given = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(given) if given.isdigit() and int(given) else max(cores // ranks, 1)  # as training sets them
    return threads, min(1.0, cores / (threads * ranks))


def measured_tflops(half: bool, *, ranks: int = 1, size: int = 1024, seconds: float = 0.3) -> tuple[float, str]:
    """Return the speed of a square product in one of `ranks` processes of this host, the best of several; and how.

    A process has its share of the cores, or as many threads as OMP_NUM_THREADS says; where all have more threads than
    there are cores, they share these.
    """
    threads, share = threads_of_a_rank(ranks)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        left = torch.randn(size, size, dtype=torch.bfloat16 if half else torch.float32)
        least, end = float("inf"), time.perf_counter() + seconds
        while time.perf_counter() < end or least == float("inf"):
            began = time.perf_counter()
            left @ left
            least = min(least, time.perf_counter() - began)
    finally:
        torch.set_num_threads(before)
    of = f", the share of one of {ranks} processes" if ranks > 1 else ""
    said = f"measured: a product of {size} x {size} now, {threads} thread{'s' if threads > 1 else ''}{of}"
    return share * 2 * size**3 / least / 1e12, said


def rests_on(
    device: Device, options: StrategyOptions, *, half: bool, ranks: int, nodes: int, sequence: int = 1
) -> list[dict[str, str]]:
    """Return each figure of the device that a step's time rests on, its value, and where it is from.

    A share whose source says that it was found in bf16 is but assumed of a step in fp32, and is said to be.
    """
    apart = ranks > 1 and options.name != "single"
    used = {
        "bf16_tflops": half,
        "fp32_tflops": not half,
        "intra_gb_s": (apart and nodes == 1) or sequence > 1,
        "inter_gb_s": apart and nodes > 1,
        "host_gb_s": options.offload,
        "host_memory_gb_s": options.offload,
        "hidden": apart,
    }

    def source(name: str) -> str:
        found = device.sources.get(name, GIVEN)
        return f"assumed to be as in bf16: {found}" if name in SHARES and not half and "bf16" in found else found

    return [
        {"figure": said, "value": f"{getattr(device, name):.4g}", "from": source(name)}
        for name, said in SAID.items()
        if used.get(name, True)
    ]
