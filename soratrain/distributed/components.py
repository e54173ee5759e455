"""What a rank will hold in memory, by component, before anything is started.

Exact arithmetic for what is kept from step to step (Rajbhandari et al., "ZeRO", 2020, section 3.1, for our types):
fp32 gradients, moments, average and the weights that the optimizer updates; weights in fp32 or bf16. ZeRO divides by
the ranks what its stage shards, and has a copy of a rank's share of the weights, which its optimizer updates. Beside
that, what comes and goes: bf16 copies of fp32 weights, which autocast makes; buffers for messages; activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from soratrain.amounts import memory, short
from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.optim import OptimizerFactory, shape_of

FP32, BF16 = 4, 2
KEPT = ("weights", "gradients", "optimizer", "average", "master")  # from step to step; the rest comes and goes


@dataclass(frozen=True)
class Component:
    """Bytes that one rank holds of one kind, in the host's memory or on its device."""

    name: str
    bytes: int
    host: bool = False


@dataclass(frozen=True)
class Memory:
    """What one rank holds.

    Attributes:
        parameters: trained numbers of all nets, over all ranks.
        components: none of no bytes.
        known: whether activations are among them.
    """

    parameters: int
    components: tuple[Component, ...]
    known: bool

    def of(self, name: str) -> int:
        """Return the bytes of a kind, wherever they lie."""
        return sum(part.bytes for part in self.components if part.name == name)

    def total(self, *, host: bool) -> int:
        """Return the bytes on the host, or on the device."""
        return sum(part.bytes for part in self.components if part.host == host)

    def line(self, strategy: str, device_type: str) -> str:
        """Return all of it in one line of words."""
        places = {False: "the GPU" if device_type == "cuda" else "a process", True: "the host"}
        said = []
        for host, place in places.items():
            parts = [part for part in self.components if part.host == host]
            if parts:
                listed = ", ".join(f"{part.name} {memory(part.bytes)}" for part in parts)
                said.append(f"{place} {memory(self.total(host=host))} ({listed})")
        lacking = "" if self.known else "; activations not counted"
        return (
            f"memory of a rank under strategy={strategy}, an estimate: {'; '.join(said)};"
            f" {short(self.parameters)} parameters{lacking}"
        )


def components(
    nets: Iterable[nn.Module],
    options: StrategyOptions,
    *,
    ranks: int,
    optimizer: str,
    average: bool,
    half: bool,
    cuda: bool,
    accumulates: bool = False,
    activations: int | None = None,
    beside: Mapping[str, int] | None = None,
) -> Memory:
    """Return what a rank holds.

    Args:
        nets: that are trained; on meta, say.
        ranks: data-parallel ranks.
        optimizer: `adamw` or `muon`.
        average: whether weights are averaged.
        half: whether nets compute in bf16.
        cuda: whether on GPUs: only there does offload move anything.
        accumulates: whether a step has several micro-batches.
        activations: bytes of the largest micro-batch, if they are known.
        beside: bytes of what else a rank computes with, by name: a frozen VAE, say.

    Raises:
        ConfigError: more than one rank under `single`.
    """
    if options.name == "single" and ranks > 1:
        raise ConfigError(f"{ranks} ranks with strategy=single, which is one process; use strategy=ddp, zero2 or zero3")
    own = [(name, param) for net in nets for name, param in net.named_parameters()]
    trained = sum(shape_of(param).numel() for _, param in own if param.requires_grad)
    every = sum(shape_of(param).numel() for _, param in own)
    states = OptimizerFactory(name=optimizer).numbers(own)
    zero, away = options.zero, options.offload and cuda
    item = BF16 if options.weights == "bf16" else FP32

    def share(numbers: int, stage: int) -> int:
        return -(-numbers // ranks) if zero >= stage else numbers

    found = [
        Component("weights", share(every, 3) * item, away and zero == 3),
        Component("gradients", share(trained, 2) * FP32, away),
        Component("optimizer", share(states, 1) * FP32, away),
        Component("average", share(trained, 1) * FP32 * average, away),
        Component("master", share(trained, 1) * FP32 * bool(zero), away),
    ]
    if options.offload:  # gradients as they are summed up, beside those that the optimizer takes; weights to be sent
        sums = share(trained, 2) * FP32 * (accumulates or zero == 3)
        found.append(Component("staging", sums + (share(trained, 2) * item if zero == 2 else 0), away))
    if zero == 3:
        found.append(Component("gathered", min(every, options.live + options.bucket) * item))
    if zero:
        message = BF16 if options.reduce == "bf16" else FP32
        found.append(Component("messages", options.bucket * message * (2 if cuda and zero < 3 else 1)))
    if half and item == FP32 and zero < 3:  # under ZeRO-3 a product keeps its weight itself
        found.append(Component("bf16 copies", every * BF16))
    found += [Component(name, count) for name, count in (beside or {}).items()]
    found.append(Component("activations", activations or 0))
    return Memory(trained, tuple(part for part in found if part.bytes), activations is not None)
