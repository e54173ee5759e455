"""Writes `weights/` when a run has reached its last step.

It may take minutes, so the last checkpoint comes first: a run that is stopped meanwhile, or killed, is at its last step
when it goes on, and only exports again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path

import lightning as L
from torch import Tensor

from soratrain.callbacks.checkpoint import Checkpoint
from soratrain.callbacks.ema import EMA
from soratrain.distributed.checkpoint import CheckpointReader, gather, step_of
from soratrain.distributed.fragments import assemble, forms_of, persistent_buffers
from soratrain.distributed.phases import Phases
from soratrain.distributed.strategy import Restorable
from soratrain.errors import DataError, on_all_ranks
from soratrain.models import weights
from soratrain.models.tensor_file import Form, in_order
from soratrain.stages.base import TrainStage

log = logging.getLogger(__name__)


class Interrupted(Exception):
    """The run was told to stop; raised on all ranks at the same parameter."""


class Export(L.Callback):
    """Exports the nets of `stage.exported()`, with averaged weights where there is an average.

    They are those of the last step, or of the checkpoint of the lowest loss on held-out clips.

    Parameters are put together one at a time from the ranks' slices and written at once, so that no rank ever holds
    more than one whole parameter beside what it trains.

    Args:
        folder: where the weights go.
        ema: the average, if any.
        largest: bytes of a file; a net that takes more is spread over several.
        best: of whose checkpoints the best is taken; None takes the last step.
        stopping: whether the run was told to stop, by any rank; all call it. The rest of the export is then left.
        phases: told how far it has come.

    Attributes:
        done: whether everything is written.
    """

    def __init__(
        self,
        folder: Path,
        ema: EMA | None = None,
        *,
        largest: int = weights.LARGEST,
        best: Checkpoint | None = None,
        stopping: Callable[[], bool] = lambda: False,
        phases: Phases | None = None,
    ) -> None:
        self.folder, self.ema, self.largest, self.best = Path(folder), ema, largest, best
        self.stopping, self.phases, self.done = stopping, phases or Phases(), False

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        assert isinstance(pl_module, TrainStage)
        if trainer.global_step < pl_module.max_steps:
            return
        try:
            self.heed()
            self.export(trainer, pl_module)
            self.done = True
        except Interrupted:
            if trainer.is_global_zero:
                log.info("stopping: %s is left to the next start, which has nothing else to do", self.folder)

    def export(self, trainer: L.Trainer, stage: TrainStage) -> None:
        """Write all of it, unless the run is told to stop meanwhile; collective.

        Raises:
            Interrupted: it was.
            DataError: on every rank, where it cannot be written.
        """
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        chosen = self.best.best_folder(trainer) if self.best else None
        step = trainer.global_step if chosen is None else step_of(chosen)
        average = self.ema.in_place(trainer) if self.ema else nullcontext()
        with average if chosen is None else weights_of(chosen, trainer, partial(self.phases.move, alike=False)):
            training = stage.training
            stage.eval()
            with strategy.computing():
                stage.finalize()
            self.write(trainer, stage, step)
            stage.train(training)

    def heed(self) -> None:
        """Go no further where the run was told to stop; collective.

        Raises:
            Interrupted: it was.
        """
        if self.stopping():
            raise Interrupted

    def heeding(self, tensors: Iterator[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield `tensors`, as many on every rank, as long as the run is not told to stop.

        Raises:
            Interrupted: it is.
        """
        for item in tensors:
            self.heed()
            self.phases.move()
            yield item

    def write(self, trainer: L.Trainer, stage: TrainStage, step: int) -> None:
        """Write every exported net as it is, as that of `step`; collective.

        Raises:
            Interrupted: on every rank, where the run is told to stop meanwhile.
            DataError: on every rank, where they cannot be written.
        """
        whole = Whole(trainer)
        names = {id(module): name for name, module in stage.named_modules()}
        for name, (module, factory, extra) in stage.exported().items():
            prefix = f"{names[id(module)]}."
            forms = {key.removeprefix(prefix): form for key, form in whole.forms.items() if key.startswith(prefix)}
            tensors = self.heeding(whole.tensors([prefix + key for key in in_order(forms)]))
            said = None
            if trainer.is_global_zero:
                own = ((key.removeprefix(prefix), tensor) for key, tensor in tensors)
                extra = {**extra, "step": step}
                try:
                    weights.write(self.folder, name, forms, own, factory, extra, largest=self.largest)
                except DataError as error:
                    said = str(error)
            for _ in tensors:  # what is asked of the other ranks, or is left where the first could not write
                pass
            if problem := gather(said)[0]:
                raise on_all_ranks(DataError(problem))


@contextmanager
def weights_of(folder: Path, trainer: L.Trainer, moved: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Compute with a checkpoint's weights inside the block, averaged where it has averages; with the own after it.

    Args:
        moved: called after each fragment that is read.
    """
    strategy, reader = trainer.strategy, CheckpointReader(folder)
    assert isinstance(strategy, Restorable)
    fragments, buffers = strategy.fragments(), persistent_buffers(trainer.lightning_module)
    before = [fragment.read().clone() for fragment in fragments], {name: own.clone() for name, own in buffers.items()}
    try:
        for fragment in fragments:
            kind = "average" if f"average/{fragment.name}" in reader else "weight"
            fragment.write(reader.read(f"{kind}/{fragment.name}", fragment.start, fragment.numel))
            moved()
        for name, buffer in buffers.items():
            buffer.copy_(reader.read(f"buffer/{name}", 0, buffer.numel()).view(buffer.shape))
        strategy.publish()
        yield
    finally:
        for fragment, value in zip(fragments, before[0], strict=True):
            fragment.write(value)
        for name, buffer in buffers.items():
            buffer.copy_(before[1][name])
        strategy.publish()


class Whole:
    """Every parameter and persistent buffer of a run, whichever ranks hold slices of it; collective.

    Attributes:
        forms: their types and shapes, by name.
    """

    def __init__(self, trainer: L.Trainer) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, Restorable)
        self.device = strategy.root_device  # type: ignore[attr-defined]
        self.fragments = strategy.fragments()
        self.values = [fragment.read() for fragment in self.fragments]
        self.known = forms_of(self.fragments, self.values)
        self.buffers = persistent_buffers(trainer.lightning_module)
        self.forms = {name: form for name, (form, _) in self.known.items()}
        self.forms |= {name: Form.of(buffer) for name, buffer in self.buffers.items()}

    def tensors(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield `(name, whole tensor on the CPU)`, one at a time, in the order of `names`."""
        parameters = assemble(
            self.fragments, self.values, self.device, [name for name in names if name in self.known], self.known
        )
        for name in names:
            if name in self.known:
                yield next(parameters)
            else:
                yield name, self.buffers[name].detach().cpu()
