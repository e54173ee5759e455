"""How one training run spreads over processes, and how each strategy saves and restores what it holds."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn

from soratrain.distributed.checkpoint import CheckpointReader, check_ranks, gather, latest_checkpoint, own_place
from soratrain.distributed.fragments import (
    Fragment,
    optimizer_states,
    persistent_buffers,
    shapes_of,
    whole_fragments,
)
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.saving import Saver
from soratrain.errors import DataError, on_all_ranks

if TYPE_CHECKING:
    from lightning.pytorch.strategies import Strategy as LightningStrategy

log = logging.getLogger(__name__)

COUNTER = "step"  # the one state of torch's optimizers that is a single number, whatever the parameter's shape
NOT_SAVED = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch")  # fragments and `step` replace them


class Restorable:
    """A Lightning strategy that saves to and restores from our own checkpoints (`checkpoint.py`).

    What is restored: every parameter and persistent buffer, the optimizer's states, the weight averages, the step, the
    learning rate that the schedule gives at that step, and the states of callbacks and of the datamodule. What is left
    of the run is a fresh epoch to Lightning, whose own counters of batches are of no use when ranks change.
    """

    lightning_module: Any
    optimizers: list[Any]
    sequence = 1  # ranks that share the tokens of a micro-batch
    skips = True  # whether a stage can leave out an update, and have more than one optimizer
    averages: list[Tensor] | None = None  # flat averages of the trained fragments, in their order
    saver: Saver | None = None  # what writes checkpoints; without one, training waits for each
    elastic = True  # whether a run may go on with another number of ranks

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return True  # fragments exist once the strategy has set up its optimizer

    @property
    def lightning_restore_optimizer(self) -> bool:
        return False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return {}

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return {}

    def building(self) -> AbstractContextManager[None]:
        """Return a context in which a net is built, on the CPU."""
        return nullcontext()

    def place(self, net: nn.Module) -> None:
        """Take over a net that has just been built."""

    def fill(self, param: Tensor, values: Tensor) -> None:
        """Set a parameter or buffer, of which a rank may hold a slice only, to its whole `values`."""
        param.detach().copy_(values)

    def fragments(self) -> list[Fragment]:
        """Return what this rank holds of every parameter."""
        return whole_fragments(self.lightning_module.named_parameters())

    def base_optimizers(self) -> list[torch.optim.Optimizer]:
        """Return the optimizers whose states are keyed by the fragments' holders."""
        return self.optimizers

    def averaged(self, trained: list[Fragment]) -> list[tuple[Fragment, Tensor]]:
        """Return each trained fragment with its average; nothing where weights are not averaged."""
        return [] if self.averages is None else list(zip(trained, self.averages, strict=True))

    def computing(self) -> AbstractContextManager[None]:
        """Return a context in which the nets take fp32 inputs outside of training too."""
        return nullcontext()

    def publish(self) -> None:
        """Let the modules compute with what has been written to the fragments."""

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write a checkpoint folder, or begin to; every rank calls it.

        Args:
            storage_options: `{"wait": True}` waits for it to be written.
        """
        first = self.lightning_module.global_rank == 0
        tensors: dict[str, Tensor] = {}
        starts: dict[str, int] = {}
        scalars: dict[str, dict[str, float]] = {}

        def keep(key: str, fragment: Fragment, value: Tensor) -> None:
            if first or not fragment.replicated:
                tensors[key], starts[key] = value, fragment.start

        fragments = self.fragments()
        for fragment in fragments:
            keep(f"weight/{fragment.name}", fragment, fragment.read())
        for key, fragment, value in optimizer_states(self.base_optimizers(), fragments):
            if key == COUNTER:
                scalars.setdefault(key, {})[fragment.name] = float(value)
            else:
                keep(f"{key}/{fragment.name}", fragment, fragment.read(value))
        trained = [fragment for fragment in fragments if fragment.trained]
        for fragment, average in self.averaged(trained):
            keep(f"average/{fragment.name}", fragment, average)
        if first:
            for name, buffer in persistent_buffers(self.lightning_module).items():
                tensors[f"buffer/{name}"], starts[f"buffer/{name}"] = buffer.flatten(), 0
        for known in gather(scalars):
            for key, values in known.items():
                scalars.setdefault(key, {}).update(values)
        state = {key: value for key, value in checkpoint.items() if key not in NOT_SAVED}
        state |= {"shapes": shapes_of(self.lightning_module), "scalars": scalars}
        saver = self.saver or Saver(beside=False)
        saver.save(Path(filepath), tensors, starts, state, **(storage_options or {}))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        """Open the newest whole checkpoint of a folder of them; `load_model_state_dict` reads it.

        Raises:
            DataError: none is whole.
            ConfigError: it is of another number of ranks, and may not be.
        """
        folder = latest_checkpoint(checkpoint_path)
        if folder is None:
            raise on_all_ranks(
                DataError(f"no checkpoint in {checkpoint_path} is whole; put a copy there, or start with fresh=true")
            )
        reader = CheckpointReader(folder)
        if own_place()[0] == 0:
            log.info("going on from %s", folder.name)
        check_ranks(folder, reader.state["ranks"], own_place()[1], elastic=self.elastic)
        return {**reader.state, "pytorch-lightning_version": L.__version__, "lr_schedulers": [], "reader": reader}

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Restore parameters, buffers, optimizer, averages, step and learning rate.

        Raises:
            DataError: the checkpoint is of another model.
        """
        reader: CheckpointReader = checkpoint["reader"]
        ours, theirs = shapes_of(self.lightning_module), checkpoint["shapes"]
        wrong = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if wrong:
            name = wrong[0]
            raise on_all_ranks(
                DataError(
                    f"checkpoint {reader.folder} is of another model: {name} is {theirs.get(name)} there and"
                    f" {ours.get(name)} here ({len(wrong)} such); use its config, or fresh=true"
                )
            )
        fragments = self.fragments()
        trained = [fragment for fragment in fragments if fragment.trained]
        for fragment in fragments:
            fragment.write(reader.read(f"weight/{fragment.name}", fragment.start, fragment.numel))
        for fragment, average in self.averaged(trained):
            average.copy_(reader.read(f"average/{fragment.name}", fragment.start, fragment.numel))
        for name, buffer in persistent_buffers(self.lightning_module).items():
            buffer.copy_(reader.read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))
        self.restore_optimizer(reader, trained)
        self.publish()
        self.restore_step(int(checkpoint["global_step"]))

    def restore_optimizer(self, reader: CheckpointReader, trained: list[Fragment]) -> None:
        """Fill the optimizers' states from the checkpoint."""
        optimizers = self.base_optimizers()
        owner = {holder: o for o in optimizers[1:] for group in o.param_groups for holder in group["params"]}
        keys = {key.split("/", 1)[0] for key in reader.pieces} - {"weight", "average", "buffer"}
        for fragment in trained:
            own = owner.get(fragment.holder, optimizers[0]).state[fragment.holder]
            for key in sorted(keys):
                if f"{key}/{fragment.name}" in reader:
                    state = own.setdefault(key, torch.zeros_like(fragment.holder))
                    fragment.write(reader.read(f"{key}/{fragment.name}", fragment.start, fragment.numel), state)
            for key, values in reader.state["scalars"].items():
                if fragment.name in values:
                    own[key] = torch.tensor(values[fragment.name], device=fragment.holder.device)

    def restore_step(self, step: int) -> None:
        """Set Lightning's step counters and the learning rate that belongs to `step`."""
        trainer = self.lightning_module.trainer
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = step
        for progress in (
            loop.automatic_optimization.optim_progress.optimizer.step,
            loop.manual_optimization.optim_step_progress,
        ):
            progress.total.ready = progress.total.completed = step
        for config in trainer.lr_scheduler_configs:
            scheduler = config.scheduler
            scheduler.last_epoch, scheduler._step_count = step, step + 1
            rates = [base * factor(step) for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
                group["lr"] = rate
            scheduler._last_lr = rates

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Nothing is left to do after `load_model_state_dict`."""


class Single(Restorable, SingleDeviceStrategy):
    """One process on one device."""


class Replicated(Restorable, DDPStrategy):
    """Every rank holds everything; gradients are averaged."""


def build_strategy(options: StrategyOptions, *, device_type: str, precision: str) -> LightningStrategy:
    """Return the Lightning strategy for `options` on `device_type` (`cpu` or `cuda`)."""
    if options.zero:
        from soratrain.distributed.zero import build_zero

        return build_zero(options, device_type=device_type, precision=precision)
    if options.name == "ddp":
        return Replicated(timeout=options.timeout, gradient_as_bucket_view=True, broadcast_buffers=False)
    return Single(device=torch.device("cuda", 0) if device_type == "cuda" else torch.device("cpu"))
