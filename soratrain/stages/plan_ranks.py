"""Of how many ranks stage=plan plans a run: as many as the training command would start, or as it is told."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from soratrain.amounts import counted
from soratrain.distributed.mesh import check_ranks
from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError

KEYS = "trainer.devices, trainer.num_nodes or stage.job.ranks"


@dataclass(frozen=True)
class Ranks:
    """The ranks of a run.

    Attributes:
        count: all of them.
        nodes: that they are on; None: as few as hold them.
        said: the keys that they are from, with their values.
        note: what was not given, and which key gives it; empty where nothing is in question.
    """

    count: int
    nodes: int | None
    said: str
    note: str = ""


def ranks_of(
    ranks: int | None,
    nodes: int | None,
    *,
    trainer_nodes: int,
    trainer_devices: int | str,
    strategy: StrategyOptions,
    sequence: int,
    on_gpu: bool,
) -> Ranks:
    """Return the ranks that are planned for.

    Args:
        ranks, nodes: what `stage.job` says; None leaves it to the trainer.
        trainer_nodes, trainer_devices: of the training command; `auto` is every GPU that is here, or else one rank on
            each node (as many as share a clip, where some do).
        strategy: how they train.
        sequence: how many share the tokens of a micro-batch.
        on_gpu: whether the run that is planned is on GPUs.

    Raises:
        ConfigError: a value out of range, with the key that it is from.
    """
    note = ""
    if ranks is not None:
        found, said = ranks, f"stage.job.ranks={ranks}"
        if ranks < 1:
            raise ConfigError(f"{said} must be at least 1")
    else:
        each, said = trainer_devices, f"trainer.num_nodes={trainer_nodes} trainer.devices={trainer_devices}"
        if each == "auto":
            here = torch.cuda.device_count() if on_gpu and strategy.name != "single" else 0
            each = here or sequence
            if on_gpu and not here and strategy.name == "single":
                note = f"strategy=single is one rank; for more: strategy=zero2 (or ddp, zero3, …) with {KEYS}"
            elif on_gpu and not here:
                ranks_here = counted(each, "ranks of each node")
                note = f"trainer.devices=auto counts as {ranks_here}, since no GPU is here; for more: {KEYS}"
        if not isinstance(each, int) or isinstance(each, bool) or each < 1:
            raise ConfigError(f"trainer.devices={trainer_devices}: use auto or a number of at least 1")
        found = trainer_nodes * each
        nodes = nodes or (trainer_nodes if trainer_devices != "auto" or trainer_nodes > 1 else None)
    check_ranks(sequence, found, said)
    if strategy.name == "single" and found > 1:
        raise ConfigError(f"{said} with strategy=single, which is one process; use strategy=ddp, zero2 or zero3")
    if nodes is not None and not 1 <= nodes <= found:
        raise ConfigError(f"stage.job.nodes={nodes}: must lie between 1 and {counted(found, 'ranks')} ({said})")
    return Ranks(found, nodes, said, note)
