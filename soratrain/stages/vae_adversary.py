"""What plays against the autoencoder's decoder: a discriminator, how much it counts, and whether it still works.

Everything that a step learns for later ones (the balance of the two gradients, the running means of logits) is summed
over the step's micro-batches and ranks first, so that it is the same on all ranks, and for any accumulation. So the
balance that a step uses is the one that the step before it measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from soratrain.batch import Batch
from soratrain.distributed import halt
from soratrain.errors import ConfigError
from soratrain.stages.vae_losses import balance, hinge, lecam, per_sample

log = logging.getLogger(__name__)

WON = 0.05  # a discriminator's loss below which it has won; 1 is where it can tell nothing
SURE = 0.99  # share of logits on the right side from which it has won
BLIND = 0.02  # difference of mean logits below which it tells nothing apart


class Adversary(nn.Module):
    """Settings and running state of the adversarial loss; the state is in checkpoints.

    Args:
        net: factory of the discriminator.
        weight: of the generator's loss, relative to the reconstruction if `adaptive`.
        adaptive: scale the weight so that both losses' gradients at the decoder's last layer are alike (VQGAN).
        max_balance: bound of that scale.
        start, warmup: fractions of the run: from `start` on the discriminator is trained, and the weight grows in
            `warmup` from 0 to its full size.
        lecam: weight of the regularisation that keeps logits near their running means; 0 for none.
        decay: of the running means, which begin with the first step's.
        window: steps over which a collapse is looked for.

    Raises:
        ConfigError: a value out of range.
    """

    means: Tensor  # running means of logits, of real and rebuilt clips
    updates: Tensor  # how often they were updated
    scale: Tensor  # of the generator's loss, measured in the step before

    def __init__(
        self,
        *,
        net: partial,
        weight: float = 0.5,
        adaptive: bool = True,
        max_balance: float = 1e4,
        start: float = 0.0,
        warmup: float = 0.1,
        lecam: float = 0.001,
        decay: float = 0.99,
        window: int = 100,
    ) -> None:
        super().__init__()
        for name, value in {"weight": weight, "max_balance": max_balance, "lecam": lecam}.items():
            if value < 0:
                raise ConfigError(f"adversary.{name}={value} must be at least 0")
        for name, value in {"start": start, "warmup": warmup, "decay": decay}.items():
            if not 0 <= value < 1:
                raise ConfigError(f"adversary.{name}={value} must lie in [0, 1)")
        if window < 1:
            raise ConfigError(f"adversary.window={window} must be at least 1")
        self.net, self.weight, self.adaptive, self.max_balance = net, weight, adaptive, max_balance
        self.start, self.warmup, self.lecam, self.decay = start, warmup, lecam, decay
        self.register_buffer("means", torch.zeros(2))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("scale", torch.tensor(0.0 if adaptive else 1.0))
        self.watch = CollapseWatch(window)
        self.notes: list[Tensor] = []  # one flat tensor a micro-batch: loss, accuracy, two logits, two slopes

    def ramp(self, step: int, max_steps: int) -> float:
        """Return the share of its weight that the generator's loss has after `step` steps; 0 before the start."""
        begun = step - self.start * max_steps
        return 0.0 if begun < 0 else min((begun + 1) / max(self.warmup * max_steps, 1.0), 1.0)

    def judge(self, disc: nn.Module, batch: Batch, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the generator's loss, the discriminator's, and what to report, of real `x` and rebuilt `y`."""
        real, fake = disc(x), disc(y)
        penalty = lecam(real, fake, *self.means) * (self.updates > 0)
        generator = batch.mean(-per_sample(fake))
        margin = batch.mean(hinge(real, fake))
        right = 0.5 * (per_sample((real > 0).float()) + per_sample((fake < 0).float()))
        told = {
            "g_loss": generator,
            "d_loss": margin,
            "d_accuracy": batch.mean(right),
            "logits_real": batch.mean(per_sample(real)),
            "logits_fake": batch.mean(per_sample(fake)),
            "lecam": batch.mean(penalty),
        }
        return generator, margin + self.lecam * told["lecam"], {name: value.detach() for name, value in told.items()}

    def differentiate(
        self,
        disc: nn.Module,
        batch: Batch,
        x: Tensor,
        y: Tensor,
        rebuilt_of: Callable[[Tensor], Tensor],
        *,
        rest: Tensor,
        last: Tensor,
        ramp: float,
        share: float,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Add a micro-batch's gradients to those of the VAE and of the discriminator.

        The losses are differentiated by the pixels `y` first. So the slopes of reconstruction and deception can be
        weighed, one pass goes back through the decoder, and one forward pass of the discriminator serves both players.

        Args:
            rebuilt_of: returns the reconstruction's loss of given pixels.
            rest: further losses of the VAE, which do not depend on the pixels.
            last: the weight of the decoder's last layer.
            ramp: share of its weight that the generator's loss has; 0 leaves the discriminator alone.
            share: of the micro-batch in the step.

        Returns:
            The loss of each player (the discriminator's if it plays), and what to report.
        """
        shown = y.detach().requires_grad_()
        rebuilt = rebuilt_of(shown)
        losses, told = {"the VAE": (rebuilt + rest).detach()}, {"loss": rebuilt + rest}
        if ramp:
            generator, against, figures = self.judge(disc, batch, x, shown)
        with torch.autocast(x.device.type, enabled=False):
            (slope,) = torch.autograd.grad(rebuilt, shown)
            if ramp:
                (towards,) = torch.autograd.grad(generator, shown, retain_graph=True)
                (against * share).backward(inputs=list(disc.parameters()))
                ways = (slope, towards) if self.adaptive else ()
                ends = [torch.autograd.grad(y, last, way, retain_graph=True)[0].flatten() for way in ways]
                seen = [figures[name] for name in ("d_loss", "d_accuracy", "logits_real", "logits_fake")]
                self.notes.append(torch.cat([torch.stack(seen).float(), *ends]))
                weight = ramp * self.weight * self.scale
                slope = slope + weight * towards
                losses["the VAE"] = losses["the VAE"] + weight * generator.detach()
                losses["the discriminator"] = against.detach()
                told |= {"d_weight": weight, **figures}
            values, slopes = [y, rest], [slope * share, torch.full_like(rest, share)]
            count = 1 + rest.requires_grad
            torch.autograd.backward(values[:count], slopes[:count])
        return losses, told

    def end_step(self, step: int, *, learn: bool) -> None:
        """Bring the state up to date with the notes of all micro-batches and ranks; not where a step was skipped."""
        if not self.notes:
            return
        total = torch.stack(self.notes).mean(0)
        self.notes = []
        if halt.together():
            dist.all_reduce(total)
            total /= dist.get_world_size()
        if not learn:
            return
        decay = torch.where(self.updates > 0, self.decay, 0.0)
        self.means.copy_(decay * self.means + (1 - decay) * total[2:4])
        self.updates += 1
        if self.adaptive:
            self.scale.copy_(balance(total[4:].chunk(2)[0], total[4:].chunk(2)[1], self.max_balance))
        self.watch.add(total[:4], step)


class CollapseWatch:
    """Says in one line when the game is over: the discriminator has won, or tells nothing apart.

    Args:
        window: steps whose mean is looked at.
    """

    def __init__(self, window: int) -> None:
        self.window, self.steps = window, 0
        self.total: Tensor | None = None
        self.said = ""

    def add(self, figures: Tensor, step: int) -> None:
        """Take in a step's loss, accuracy and mean logits of real and rebuilt clips; warn once a window at most."""
        self.total = figures.clone() if self.total is None else self.total + figures
        self.steps += 1
        if self.steps < self.window:
            return
        loss, accuracy, real, fake = (self.total / self.steps).tolist()
        self.total, self.steps = None, 0
        verdict = ""
        if loss < WON or accuracy > SURE:
            verdict = "has won and teaches nothing more: lower optimizer.disc.lr, or raise adversary.lecam"
        elif abs(real - fake) < BLIND:
            verdict = "tells nothing apart: raise optimizer.disc.lr, or give it more channels"
        if verdict and verdict != self.said and halt.speaks():
            log.warning(
                "step %d: the discriminator %s (last %d steps: d_loss %.3g, accuracy %.1f %%, logits real %.3g, fake"
                " %.3g)",
                step,
                verdict,
                self.window,
                loss,
                100 * accuracy,
                real,
                fake,
            )
        self.said = verdict
