"""How long an optimizer step will take: a cost model that fits on a page, with constants that can be looked up.

    step = micro-batches x (products + attention + passes over memory, all of it again where it is recomputed,
                            + messages that computing does not hide)
           + messages of the update + the optimizer's passes over memory

Messages are those of Rajbhandari et al., "ZeRO", 2020, section 7, sent round a ring: (n - 1) / n of a buffer to gather
or to scatter, twice that to sum up on every rank. Loading, logging and stragglers are left out, and kernels run as fast
as large ones do: it is a bound from below. `tests/bench/bench_predict.py` puts it beside what has been measured.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError

PASSES = 6  # over each activation that is kept: written and read, and so its gradient, and the two read once more
OPTIMIZER = 7 + 3  # fp32 numbers read or written for a parameter: AdamW's four (three back), the average's two (one)
OPERATIONS = 180  # of a block, forwards and backwards
GIGA = 1e9


@dataclass(frozen=True, kw_only=True)
class Device:
    """What a step is computed on.

    Attributes:
        bf16_tflops, fp32_tflops: peak of dense products; 0 where it is to be measured here.
        matmul, attention: the part of it that large products, and attention forwards and backwards, reach.
        memory_gib: of a device.
        memory_gb_s: its bandwidth.
        intra_gb_s: between two devices of a node, one way.
        inter_gb_s: from a node to another, one way, all of its cards together.
        host_gb_s: from a device to its host, one way.
        host_memory_gb_s: of the host's memory, for each device.
        per_node: devices.
        hidden: the part of computing under which messages can hide.
        launch_us: time of an operation however small it is.
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

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value < 0 or (value == 0 and not field.name.endswith(("_tflops", "hidden", "launch_us"))):
                raise ConfigError(f"stage.devices: {field.name}={value} must be positive")

    def peak(self, half: bool) -> float:
        """Return operations a second."""
        return (self.bf16_tflops if half else self.fp32_tflops) * 1e12


def device_of(devices: Mapping[str, Mapping[str, Any]], name: str, half: bool) -> Device:
    """Return the device called `name`; a peak that it does not say is measured on this machine, within a second.

    Raises:
        ConfigError: there is none of that name, or a value is out of range.
    """
    if name not in devices:
        raise ConfigError(
            f"stage.device={name} is not there; use one of {', '.join(devices)}, or add stage.devices.{name}"
        )
    try:
        found = Device(**devices[name])
    except TypeError as error:
        raise ConfigError(f"stage.devices.{name}: {error}; it needs what the others have") from error
    if found.peak(half):
        return found
    speed = measured_tflops(half)
    return replace(found, bf16_tflops=speed) if half else replace(found, fp32_tflops=speed)


def measured_tflops(half: bool, size: int = 1024, seconds: float = 0.3) -> float:
    """Return the speed of a square product on this process's CPU threads, the best of several."""
    left = torch.randn(size, size, dtype=torch.bfloat16 if half else torch.float32)
    least, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end or least == float("inf"):
        began = time.perf_counter()
        left @ left
        least = min(least, time.perf_counter() - began)
    return 2 * size**3 / least / 1e12


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one rank does in a step.

    Attributes:
        products, attention: operations forwards, of all its micro-batches.
        again: the part of the products, and of attention, that the backward pass does once more.
        kept: bytes of activations that the backward pass needs, of all its micro-batches.
        blocks: how many there are.
        parameters: of all nets.
        micro_batches: in a step.
        exchanged: bytes that it hands to ranks which share its tokens, within a node.
    """

    products: float
    attention: float
    again: tuple[float, float] = (0.0, 0.0)
    kept: float
    blocks: int
    parameters: int
    micro_batches: int = 1
    exchanged: float = 0.0


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, and what they go to.

    Attributes:
        computing: products and attention, without what is done again.
        again: what is done again.
        memory: passes over activations, and what operations cost however small they are.
        messages: what computing does not hide.
        optimizer: the update, and the average.
        host: what goes between the devices and the host.
        utilisation: operations of the model, those done again not counted, over the peak.
    """

    computing: float
    again: float
    memory: float
    messages: float
    optimizer: float
    host: float
    utilisation: float = 0.0

    @property
    def total(self) -> float:
        """Return the seconds of a step."""
        return self.computing + self.again + self.memory + self.messages + self.optimizer + self.host


def bandwidth(device: Device, ranks: int, nodes: int) -> float:
    """Return the bytes a second that a ring of all ranks passes on; a node's rings share what leads out of it."""
    return (device.intra_gb_s if nodes == 1 else min(device.intra_gb_s, device.inter_gb_s)) * GIGA


def volumes(options: StrategyOptions, parameters: int, micro_batches: int) -> tuple[float, float]:
    """Return the bytes of the buffers that a rank's ring passes on: under a step's computing, and after it."""
    item = 2 if options.weights == "bf16" else 4
    grad = 2 if options.reduce == "bf16" else 4
    if options.name == "single":
        return 0.0, 0.0
    if not options.zero:
        return 2.0 * parameters * grad, 0.0  # once a step, under the last micro-batch
    if options.zero == 3:
        return micro_batches * parameters * (2.0 * item + grad), 0.0
    return parameters * grad * (micro_batches if options.zero == 2 else 1.0), float(parameters * item)


def step_time(work: Work, options: StrategyOptions, device: Device, *, ranks: int, nodes: int, half: bool) -> StepTime:
    """Return how long a step of `ranks` devices on `nodes` nodes takes."""
    peak = device.peak(half)
    products, attention = work.products / (peak * device.matmul), work.attention / (peak * device.attention)
    computing = 3 * (products + attention)
    again = work.again[0] * products + work.again[1] * attention
    launches = OPERATIONS * work.blocks * work.micro_batches * device.launch_us / 1e6
    passes = PASSES * work.kept / (device.memory_gb_s * GIGA)
    cpu = device.launch_us and not device.hidden  # where nothing runs ahead
    memory = passes + launches if cpu else max(passes, launches - computing - again)
    passed = (ranks - 1) / ranks / bandwidth(device, ranks, nodes)
    under, after = (volume * passed for volume in volumes(options, work.parameters, work.micro_batches))
    # ZeRO-3 sends in all of a step, ZeRO-2 in backward passes; what is reduced once, in that of the last micro-batch
    sending = {3: 1.0, 2: 2 / 3}.get(options.zero, 2 / 3 / work.micro_batches)
    room = device.hidden * (computing + again + memory) * sending
    messages = max(under - room, 0.0) + after + work.exchanged / (device.intra_gb_s * GIGA)
    share = work.parameters / (ranks if options.zero else 1)
    speed = device.host_memory_gb_s if options.offload else device.memory_gb_s
    optimizer = OPTIMIZER * 4 * share / (speed * GIGA)
    host = 0.0
    if options.offload:
        item = 2 if options.weights == "bf16" else 4
        sent = share * (4 + item) + (2 * work.micro_batches * share * item if options.zero == 3 else 0)
        host = sent / (device.host_gb_s * GIGA)
    found = StepTime(computing, again, memory, messages, optimizer, host)
    return replace(found, utilisation=3 * (work.products + work.attention) / (found.total * peak))
