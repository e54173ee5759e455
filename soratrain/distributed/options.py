"""What a user chooses of how a run spreads over processes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import timedelta

from soratrain.errors import ConfigError

NAMES = ("single", "ddp", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
KINDS = ("fp32", "bf16")  # of numbers


@dataclass(frozen=True, kw_only=True)
class StrategyOptions:
    """Which strategy, and its few settings.

    Attributes:
        name: `single`; `ddp`; or `zero1`, `zero2`, `zero3`: optimizer states, also gradients, also parameters sharded.
            `zero2_offload` and `zero3_offload` keep the optimizer and the fp32 weights that it updates in the host's
            memory, the latter also each rank's share of the weights.
        weights: what the nets compute with: `fp32`, or `bf16` (zero2, zero3 and their offloads): half the memory and
            messages. The optimizer, the weight average and checkpoints keep fp32 either way.
        reduce: gradients are averaged over ranks in `fp32` or `bf16` (ZeRO); micro-batches are summed in fp32.
        bucket: numbers reduced or gathered in one message (ZeRO).
        live: most numbers of weights that stay gathered because they are soon needed again (ZeRO-3).
        timeout_minutes: how long a rank waits for another before the run ends, whatever they talk over and about.

    Raises:
        ConfigError: an unknown name, or a value out of range.
    """

    name: str = "single"
    weights: str = "fp32"
    reduce: str = "fp32"
    bucket: int = 50_000_000
    live: int = 200_000_000
    timeout_minutes: float = 30

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ConfigError(f"strategy.name={self.name!r} is unknown; use one of {', '.join(NAMES)}")
        for key, value in (("weights", self.weights), ("reduce", self.reduce)):
            if value not in KINDS:
                raise ConfigError(f"strategy.{key}={value!r} is unknown; use one of {', '.join(KINDS)}")
        if self.weights == "bf16" and self.zero < 2:
            raise ConfigError(
                f"strategy.weights=bf16 with strategy={self.name}: only ZeRO-2 and -3 keep fp32 weights beside those in"
                " bf16; use strategy=zero2 or zero3, or strategy.weights=fp32 (trainer.precision=bf16-mixed computes in"
                " bf16)"
            )
        if self.reduce == "bf16" and not self.zero:
            raise ConfigError(
                f"strategy.reduce=bf16 with strategy={self.name}: gradients are averaged in fp32 there; use zero1,"
                " zero2 or zero3, or strategy.reduce=fp32"
            )
        if self.bucket < 1 or self.live < 0 or not 0 < self.timeout_minutes < math.inf:
            raise ConfigError(
                f"strategy.bucket={self.bucket}, live={self.live}, timeout_minutes={self.timeout_minutes}: must be"
                " positive and finite"
            )

    @property
    def timeout(self) -> timedelta:
        """What every group of ranks is made with."""
        return timedelta(minutes=self.timeout_minutes)

    @property
    def zero(self) -> int:
        """The ZeRO stage, 0 for none."""
        return int(self.name[4]) if self.name.startswith("zero") else 0

    @property
    def offload(self) -> bool:
        """Whether the optimizer's states lie in the host's memory."""
        return self.name.endswith("_offload")
