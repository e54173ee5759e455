"""What every trained stage shares: building its nets, its optimizer, and reporting.

A subclass implements `training_step(batch, batch_idx) -> loss` and takes all randomness from the batch's `draws`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from soratrain.batch import Batch, draw_of
from soratrain.data.plan import Plan
from soratrain.errors import ConfigError
from soratrain.models import weights
from soratrain.models.caption_model import CaptionModel
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.clipping import AdaptiveClip
from soratrain.stages.guard import StepGuard

COUNTS = ("tokens", "samples", "frames", "bad_steps", "clipped")  # reported quantities that are summed
WORKED = ("flops", "padded")  # summed too, and shown as shares: of what the hardware can do, of what was computed
CAPTIONS, MODES_SHOWN = "captions_", "modes_"
SHARES = (CAPTIONS, MODES_SHOWN)  # how names begin of what is summed and shown as a share of samples; not averaged
PATIENCE = 16  # batches without a caption, after which that is said
SHOWN = ("synthetic", "original", "none"), ("gt", "short", "long", "camera", "tags", "other")  # sources, types


def summed(key: str) -> bool:
    """Return whether a reported quantity is summed over micro-batches and ranks, not averaged."""
    return key in COUNTS or key in WORKED or key.startswith(SHARES)


class TrainStage(L.LightningModule):
    """A LightningModule that builds its nets late, one by one, so that a sharding strategy can cut each up in turn.

    Args:
        nets: factory of each net; net `x` becomes the attribute `self.x` in `configure_model`.
        optimizer: over all parameters that require gradients.
        schedule: of the learning rate.
        max_steps: optimizer steps in the whole run.
        max_bad_steps: how many optimizer steps in a row may be skipped because their loss or gradient is no number; the
            next one ends the run. None skips none: the first ends it. Under ZeRO, whose engine steps by itself, that
            is so in any case.

    Attributes:
        helpers: nets that only help in training: neither exported nor begun from `init`.
        score: the step at which the loss on held-out clips was last measured, and that loss, the same on all ranks.
    """

    helpers: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        nets: Mapping[str, partial],
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_steps: int,
        max_bad_steps: int | None = None,
    ) -> None:
        super().__init__()
        self.factories = dict(nets)
        self.guard = None if max_bad_steps is None else StepGuard(max_bad_steps)
        self.adaptive = AdaptiveClip(optimizer.clip_adaptive) if optimizer.clip_adaptive else None
        self.optimizer_factory, self.schedule, self.max_steps = optimizer, schedule, max_steps
        self.origins: dict[str, tuple[Path, str]] = {}
        self.reported: dict[str, tuple[Tensor, int]] = {}
        self.score: tuple[int, float] | None = None
        self.silent = 0  # batches without captions, in a row

    def start_from(self, name: str, folder: str | Path, stored_as: str = "") -> None:
        """Let net `name` begin with the weights in `folder` (stored there as `stored_as`) when it is built.

        Raises:
            DataError: the folder does not hold them.
        """
        stored_as = stored_as or name
        weights.resolve(folder, stored_as)
        self.origins[name] = (Path(folder), stored_as)

    def configure_model(self) -> None:
        """Build every net that is not built yet; a net's first weights depend on the run's seed and its name alone."""
        strategy = self.trainer.strategy if self._trainer is not None else None
        places: Any = strategy if hasattr(strategy, "place") else None
        for name, factory in self.factories.items():
            if hasattr(self, name):
                continue
            with torch.random.fork_rng(), places.building() if places else nullcontext():
                torch.manual_seed(draw_of(torch.initial_seed(), "net", name))
                net = factory()
            if places:
                places.place(net)
            if name in self.origins:
                folder, stored_as = self.origins[name]
                state, _ = weights.load_state(folder, stored_as)
                weights.load_into(net, state, f"{folder}:{stored_as}", places.fill if places else None)
            elif isinstance(net, CaptionModel):
                net.read_stored(places.fill if places else None)
            setattr(self, name, net)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule, stepped once an optimizer step.

        Raises:
            ConfigError: clipping shall adapt where the strategy's engine clips.
        """
        if self.adaptive and self._trainer is not None and not getattr(self.trainer.strategy, "skips", True):
            raise ConfigError("optimizer.clip_adaptive: under ZeRO the engine clips by itself; use strategy=ddp")
        optimizer = self.optimizer_factory(self.named_parameters())
        scheduler = LambdaLR(optimizer, lambda step: self.schedule(step, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def activations(self, plan: Plan, nets: Mapping[str, nn.Module], half: bool) -> int | None:
        """Return the bytes that the largest micro-batch keeps; None where that is unknown.

        Args:
            nets: the stage's, on meta.
            half: in bf16, not fp32.
        """
        return None

    def beside(self, nets: Mapping[str, nn.Module]) -> tuple[Mapping[str, int], str]:
        """Return the bytes of what this stage computes with beside `nets`, by name, and what of it is not counted."""
        return {}, ""

    def exported(self) -> dict[str, tuple[nn.Module, partial, dict[str, Any]]]:
        """Return what belongs into `weights/`: name → (net, its factory, plain values kept beside it)."""
        kept = {name: factory for name, factory in self.factories.items() if name not in self.helpers}
        return {name: (getattr(self, name), factory, {}) for name, factory in kept.items()}

    def finalize(self) -> None:
        """Do what is left when training is over, with the nets' final (averaged) weights in place, before export."""

    def configure_gradient_clipping(
        self,
        optimizer: Any,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip the norm of the whole gradient and report it as it was before; leave out an update that is spoilt."""
        params = [param for group in optimizer.param_groups for param in group["params"] if param.grad is not None]
        if not getattr(self.trainer.strategy if self._trainer is not None else None, "skips", True):
            params = []  # the engine clips by itself; what is here is but a rank's share
        norm = torch.nn.utils.get_total_norm([param.grad for param in params])
        if self.adaptive:
            limit = self.adaptive(norm, gradient_clip_val or 0.0)
            if limit is not None:  # as 1, the norm in units of it: a limit on a device need not be waited for
                torch.nn.utils.clip_grads_with_norm_(params, 1.0, norm / limit.to(norm))
                self.report(clip_limit=limit, clipped=(norm > limit) * (self.global_rank == 0))
        elif gradient_clip_val:
            torch.nn.utils.clip_grads_with_norm_(params, gradient_clip_val, norm)
        self.report(grad_norm=norm)
        if self.guard is not None:
            loss, skips = self.reported["loss"][0], getattr(self.trainer.strategy, "skips", False)
            bad = skips and self.guard.spoilt([torch.stack([loss, norm.to(loss)])])[0]
            for param in params if bad else ():
                param.grad = None  # an optimizer passes over what has none
            self.note_step(["the net"] if bad else [])

    def note_step(self, skipped: list[str]) -> None:
        """Report whether a step skipped the updates of anything; if so, its counts are kept and its figures are not.

        Raises:
            DivergedError: too many such steps in a row.
        """
        assert self.guard is not None
        if skipped:
            self.reported = {key: value for key, value in self.reported.items() if summed(key)}
        self.report(bad_steps=bool(skipped) and self.global_rank == 0)
        self.guard.count(skipped, self.global_step + 1)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.guard is not None:
            checkpoint["bad_in_a_row"] = self.guard.in_a_row
        if self.adaptive:
            checkpoint["adaptive_clip"] = self.adaptive.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.guard is not None:
            self.guard.in_a_row = checkpoint.get("bad_in_a_row", 0)
        if self.adaptive and "adaptive_clip" in checkpoint:
            self.adaptive.load_state_dict(checkpoint["adaptive_clip"])

    def report(self, **values: Tensor | float) -> None:
        """Hand numbers of this micro-batch to the progress bar, `metrics.csv` and the logger.

        `tokens`, `samples`, `frames`, `bad_steps`, `clipped`, `flops` (operations that the clips needed), `padded`
        (positions computed for nothing, which `tokens` leaves out) and what begins with `captions_` or `modes_` are
        counts, summed over micro-batches and ranks; all else is averaged.
        """
        for key, value in values.items():
            number = value.detach().double() if isinstance(value, Tensor) else torch.tensor(float(value)).double()
            before, count = self.reported.get(key, (torch.zeros_like(number), 0))
            self.reported[key] = (before + number, count + 1)

    def report_captions(self, batch: Batch) -> None:
        """Report of which sources and types the captions of a batch are, the same names on every rank."""
        sources, types = SHOWN
        found = Counter(source or "none" for source in batch.sources)
        found += Counter(style if style in types else "other" for style in batch.styles if style)
        self.report(**{f"{CAPTIONS}{name}": found[name] for name in (*sources, *types)})

    def silence(self, batch: Batch) -> str:
        """Return in words that clips have no captions, once, when so many batches in a row have had none; else ""."""
        self.silent = 0 if any(batch.captions) else self.silent + 1
        if self.silent != PATIENCE:
            return ""
        return f"{PATIENCE} batches in a row, such as that of clip {batch.keys[0]}, have no captions"

    def take_reported(self) -> dict[str, Tensor]:
        """Return this rank's numbers since the last call: counts summed, the rest averaged; then start anew."""
        taken = {key: total if summed(key) else total / count for key, (total, count) in self.reported.items()}
        self.reported = {}
        return taken
