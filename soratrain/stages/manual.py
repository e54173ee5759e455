"""A stage that takes its optimizer steps itself, with several optimizers at once.

Under Lightning's manual optimisation each optimizer that steps counts as a step, and its own accumulation and clipping
are refused; DDP's reducer waits in every backward pass for parameters that only the other optimizer has. So a stage
differentiates its losses without them: gradients add up over micro-batches here, are averaged over ranks once a step,
and Lightning's counter moves by one a step, whichever updates were made. Everything that counts steps (checkpoints,
schedules, progress, the end of the run) reads that counter.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from soratrain.distributed import halt
from soratrain.errors import ConfigError
from soratrain.optim import OptimizerFactory
from soratrain.stages.base import TrainStage

MESSAGE = 1 << 24  # numbers averaged over ranks in one message


class ManualStage(TrainStage):
    """What such a stage shares; it acts only where `automatic_optimization` is False.

    Attributes:
        accumulate: micro-batches of a rank in an optimizer step.
        clip: largest norm of the first optimizer's gradient, 0 for none.
    """

    accumulate = 1
    clip = 0.0
    seen = 0  # micro-batches of the step that is being made

    def take_over(self, trainer: L.Trainer) -> None:
        """Take accumulation and clipping from the trainer, which would refuse to train with them.

        Raises:
            ConfigError: the strategy has one optimizer only, or clipping shall adapt.
        """
        if self.adaptive:
            raise ConfigError(
                "optimizer.clip_adaptive: a stage with two optimizers clips each to its own clip; set"
                " optimizer.clip_adaptive=0"
            )
        if not getattr(trainer.strategy, "skips", True):
            raise ConfigError(
                "ZeRO: DeepSpeed takes one optimizer, and a discriminator needs its own; use strategy=ddp"
            )
        self.accumulate, self.clip = trainer.accumulate_grad_batches, trainer.gradient_clip_val or 0.0
        trainer.accumulate_grad_batches, trainer.gradient_clip_val = 1, None

    def with_schedule(self, factory: OptimizerFactory, named: Iterable[tuple[str, Parameter]]) -> dict[str, Any]:
        """Return an optimizer and its schedule."""
        optimizer = factory(named)
        schedule = LambdaLR(optimizer, lambda step: self.schedule(step, self.max_steps))
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def last_of_step(self) -> bool:
        """Count a micro-batch, and return whether it was the step's last."""
        self.seen = (self.seen + 1) % self.accumulate
        return self.seen == 0

    def take_step(self, losses: Mapping[str, Tensor], clips: Mapping[str, float]) -> list[str]:
        """Take a step with every optimizer; return of what the update was skipped, since it is no number.

        Args:
            losses: what must be finite besides the gradient, by what an optimizer trains; one without a loss rests.
            clips: largest gradient norm of each, 0 for none, in the order of the optimizers.
        """
        found: Any = self.optimizers(use_pl_optimizer=False)
        playing = [(name, optimizer) for name, optimizer in zip(clips, found, strict=True) if name in losses]
        norms, values = {}, []
        for name, optimizer in playing:
            params = params_of(optimizer)
            average_over_ranks(params)
            norms[name] = torch.nn.utils.get_total_norm([param.grad for param in params if param.grad is not None])
            values.append(torch.stack([losses[name].float(), norms[name].float()]))
        assert self.guard is not None
        skipped = [name for (name, _), bad in zip(playing, self.guard.spoilt(values), strict=True) if bad]
        for name, optimizer in playing:
            if name not in skipped:
                if clips[name]:
                    torch.nn.utils.clip_grads_with_norm_(params_of(optimizer), clips[name], norms[name])
                with torch.autocast(self.device.type, enabled=False):  # Muon multiplies matrices, and not in bf16
                    optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        schedulers: Any = self.lr_schedulers()
        for scheduler in schedulers:
            scheduler.step()
        columns = ("grad_norm", "d_grad_norm")
        self.report(**{columns[list(clips).index(name)]: norm for name, norm in norms.items()})
        self.note_step(skipped)
        progress = self.trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress
        progress.increment_ready()
        progress.increment_completed()
        return skipped


def params_of(optimizer: torch.optim.Optimizer) -> list[Parameter]:
    """Return all that an optimizer trains."""
    return [param for group in optimizer.param_groups for param in group["params"]]


def average_over_ranks(params: Sequence[Parameter]) -> None:
    """Average the gradients of `params` over ranks; one that a rank lacks counts as zero."""
    if not halt.together():
        return
    waiting: list[Tensor] = []
    for number, param in enumerate(params):
        if param.grad is None:
            param.grad = torch.zeros_like(param)
        waiting.append(param.grad)
        if number == len(params) - 1 or sum(grad.numel() for grad in waiting) >= MESSAGE:
            flat = torch.cat([grad.flatten() for grad in waiting])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            for grad, part in zip(waiting, flat.split([grad.numel() for grad in waiting]), strict=True):
                grad.copy_(part.view_as(grad))
            waiting = []
