"""How long an optimizer step will take: a cost model that fits on a page, with constants that can be looked up.

    step = micro-batches x (products + attention + passes over memory, all of it again where it is recomputed,
                            + messages that computing does not hide)
           + messages of the update + the optimizer's passes over memory

Messages are those of Rajbhandari et al., "ZeRO", 2020, section 7, sent round a ring: (n - 1) / n of a buffer to gather
or to scatter, twice that to sum up on every rank. Loading, logging and stragglers are left out, and kernels run as fast
as large ones do: it is a bound from below. `tests/bench/bench_predict.py` puts it beside what has been measured.

A device's figures are in conf/stage/plan.yaml, each with its source; the model's own are here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from soratrain.distributed.options import StrategyOptions
from soratrain.stages.plan_device import Device

# Both in bf16 and in fp32, uncompiled, first of the forward pass: what recomputing repeats, `selective` a little less.
OPERATIONS = {True: (72, 200), False: (44, 140)}  # of a block
PASSES = {True: (3.7, 12), False: (1.9, 7)}  # over each activation that is kept
BACKWARD = 2.5
OPTIMIZER = 7 + 3
GIGA = 1e9


def constants(half: bool) -> list[dict[str, str]]:
    """Return each constant of the model, its value, and where it is from."""
    counted = "counted: a DiT's uncompiled block, forwards and backwards (make bench ONLY=constants)"
    scores = "cited: it computes its scores again, 5 products for 2 (Dao, FlashAttention-2, 2023, section 4.1)"
    adamw = "counted: AdamW's four, three of them back; the average's two, one of them back"
    found = (
        ("passes over each activation that is kept", PASSES[half][1], counted),
        ("of them, those that recomputing repeats", PASSES[half][0], counted),
        ("operations of a block", OPERATIONS[half][1], counted),
        ("of them, those that recomputing repeats", OPERATIONS[half][0], counted),
        ("attention backwards, by attention forwards", BACKWARD, scores),
        ("fp32 numbers of a parameter that an update passes over", OPTIMIZER, adamw),
    )
    return [{"figure": said, "value": f"{value:.4g}", "from": source} for said, value, source in found]


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
    computing = 3 * products + (1 + BACKWARD) * attention
    again = work.again[0] * products + work.again[1] * attention
    operations, over = (both + forwards * any(work.again) for forwards, both in (OPERATIONS[half], PASSES[half]))
    launches = operations * work.blocks * work.micro_batches * device.launch_us / 1e6
    passes = over * work.kept / (device.memory_gb_s * GIGA)
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
