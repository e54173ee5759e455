"""Says before a run starts what each of its processes will hold in memory; warns where there is not as much."""

from __future__ import annotations

import logging
import os

import lightning as L
import torch

from soratrain.amounts import memory
from soratrain.distributed.components import Memory, components
from soratrain.distributed.options import StrategyOptions
from soratrain.stages.base import TrainStage

log = logging.getLogger(__name__)


class Foretold(L.Callback):
    """Tells the memory of a rank by component, before any net is built.

    Args:
        options: the strategy.
        average: whether weights are averaged.
        half: whether nets compute in bf16.
        cuda: whether on GPUs.
    """

    def __init__(self, options: StrategyOptions, *, average: bool, half: bool, cuda: bool) -> None:
        self.options, self.average, self.half, self.cuda = options, average, half, cuda
        self.memory: Memory | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit" or not trainer.is_global_zero:
            return
        assert isinstance(pl_module, TrainStage)
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            nets = {name: factory() for name, factory in pl_module.factories.items()}
        ask = getattr(getattr(trainer, "datamodule", None), "plan", None)
        with torch.random.fork_rng(devices=[]):  # a VAE's are measured
            activations = pl_module.activations(ask(), nets, self.half) if ask else None
        beside, unknown = pl_module.beside(nets)
        self.memory = components(
            nets.values(),
            self.options,
            ranks=trainer.world_size,
            optimizer=pl_module.optimizer_factory.name,
            average=self.average,
            half=self.half,
            cuda=self.cuda,
            accumulates=trainer.accumulate_grad_batches > 1,
            activations=activations,
            beside=beside,
        )
        log.info("%s%s", self.memory.line(self.options.name, "cuda" if self.cuda else "cpu"), unknown)
        for line in shortages(self.memory, self.room(trainer)):
            log.warning("%s", line)

    def room(self, trainer: L.Trainer) -> dict[bool, int]:
        """Return the bytes that a rank may take of the host's memory (True) and of its device (False)."""
        host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // max(trainer.num_devices, 1)
        if not self.cuda:
            return {False: host}
        return {True: host, False: torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory}


def shortages(held: Memory, room: dict[bool, int]) -> list[str]:
    """Return a line for each place that does not have as much memory as is needed there."""
    places = {True: "the host's memory, shared by its processes", False: "a process's or GPU's memory"}
    return [
        f"{memory(held.total(host=host))} is more than {places[host]}, {memory(least)}: use more ranks"
        " (trainer.devices, trainer.num_nodes) or strategy=zero3, smaller micro-batches (data.tokens_per_batch), or"
        " for a DiT dit.recompute=full"
        for host, least in room.items()
        if held.total(host=host) > least
    ]
