"""stage=vae: train the autoencoder from scratch on clips and images, then measure its latents' statistics."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn

from soratrain.batch import VideoBatch, random_crop, to_pixels
from soratrain.data.plan import Plan
from soratrain.errors import ConfigError
from soratrain.models.lpips import SMALLEST
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.manual import ManualStage
from soratrain.stages.plan_scale import vae_activations
from soratrain.stages.vae_adversary import Adversary
from soratrain.stages.vae_latents import FrozenEncoder, measured
from soratrain.stages.vae_losses import Perceptual, foreground, kl


class VAEStage(ManualStage):
    """Reconstruction, plus weighted KL divergence from a standard normal; both as nats-like sums per pixel value.

    With an adversary the decoder also learns to deceive a discriminator, which has its own optimizer
    (`optimizer.disc`). With a frozen encoder the decoder alone is trained, on the posterior's means, which are what
    caches hold; encoder and latent statistics stay, to the last bit, so that caches stay valid.

    Args:
        net: factory of the VAE.
        crop: train on random squares of this many pixels, clips of more scenes for the same cost; 0 takes whole frames,
            as are sides that are shorter.
        l1_weight, l2_weight: of the absolute and the squared error.
        gradient_weight: of the absolute error of differences between neighbouring pixels, which sharpens edges.
        kl_weight: of the divergence.
        latent_noise: largest extra noise on the latent, as a fraction of each channel's deviation in the micro-batch;
            each sample draws its own up to it. The decoder so learns to bear a sampler's errors.
        foreground_weight: extra weight of pixels that differ from their clip's median colour, at the first step.
        foreground_until: fraction of the run at which that weight has fallen, linearly, to zero: below 1, since what
            is trained with it to the end keeps halos.
        statistics_batches: micro-batches a rank from which the latents' mean and deviation are measured at the end.
        lpips: the perceptual loss, on where its weights are given.
        adversary: the discriminator's part; None for none.
        freeze_encoder: train the decoder only; `init` must say of which VAE.
        max_bad_steps: see TrainStage.

    Raises:
        ConfigError: a weight is negative, none of the reconstruction weights is positive, or a fraction is not one; an
            adversary without an optimizer of its own.
    """

    vae: VAE
    disc: nn.Module
    helpers = ("disc",)

    def __init__(
        self,
        *,
        net: partial,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_steps: int,
        crop: int = 0,
        l1_weight: float = 1.0,
        l2_weight: float = 0.0,
        gradient_weight: float = 0.0,
        kl_weight: float = 1e-6,
        latent_noise: float = 0.0,
        foreground_weight: float = 0.0,
        foreground_until: float = 0.6,
        statistics_batches: int = 16,
        lpips: Perceptual | None = None,
        adversary: Adversary | None = None,
        freeze_encoder: bool = False,
        max_bad_steps: int = 10,
    ) -> None:
        nets = {"vae": net} | ({"disc": adversary.net} if adversary else {})
        super().__init__(
            nets=nets, optimizer=optimizer, schedule=schedule, max_steps=max_steps, max_bad_steps=max_bad_steps
        )
        weights = dict(
            l1_weight=l1_weight,
            l2_weight=l2_weight,
            gradient_weight=gradient_weight,
            kl_weight=kl_weight,
            latent_noise=latent_noise,
            foreground_weight=foreground_weight,
        )
        for name, value in weights.items():
            if value < 0:
                raise ConfigError(f"{name}={value} must be at least 0")
        if l1_weight + l2_weight <= 0:
            raise ConfigError("l1_weight and l2_weight are both 0, so nothing would be learned; make one positive")
        if foreground_weight and not 0 < foreground_until < 1:
            raise ConfigError(f"foreground_until={foreground_until} must lie between 0 and 1")
        if statistics_batches < 1:
            raise ConfigError(f"statistics_batches={statistics_batches} must be at least 1")
        if crop < 0:
            raise ConfigError(f"crop={crop} must be at least 0")
        self.lpips = lpips or Perceptual()
        if self.lpips.on and 0 < crop < SMALLEST:
            raise ConfigError(
                f"crop={crop}: LPIPS sees nothing smaller than {SMALLEST} pixels; use at least that, or 0"
            )
        if adversary and optimizer.disc is None:
            raise ConfigError("optimizer.disc=null: a discriminator needs its own; see conf/experiment/vae_c.yaml")
        self.automatic_optimization = adversary is None
        self.adversary, self.freeze_encoder = adversary, freeze_encoder
        self.frozen = FrozenEncoder()
        self.losses: dict[str, Tensor] = {}  # of the step that is being made, by whom they train
        self.crop = crop
        self.l1_weight, self.l2_weight, self.gradient_weight = l1_weight, l2_weight, gradient_weight
        self.kl_weight, self.latent_noise = kl_weight, latent_noise
        self.foreground_weight, self.foreground_until = foreground_weight, foreground_until
        self.statistics_batches = statistics_batches

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor | None:
        """Return the loss of one micro-batch; with an adversary, differentiate it and take the step when it is time.

        Raises:
            ConfigError: the clips' size does not fit the VAE's stride.
        """
        x = to_pixels(random_crop(batch, self.crop)) if self.crop else batch.pixels()
        latent, divergence = self.latent(batch, x)
        y = self.vae.decode_chunk(latent)[0].float()
        psnr = -10 * torch.log10((y.detach() - x).square().flatten(1).mean(1) / 4 + 1e-10)
        self.report(psnr=psnr.mean(), samples=len(batch), frames=x.shape[2] * len(x))
        if self.adversary is not None:
            self.play(batch, x, y, divergence)
            return None
        loss = batch.mean(self.picture(batch, x, y) + self.kl_weight * divergence)
        self.report(loss=loss)
        return loss

    def latent(self, batch: VideoBatch, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder is given, and each sample's divergence, which is 0 where the encoder is frozen."""
        if self.freeze_encoder:
            with torch.no_grad():
                latent = mean = self.vae.posterior(x)[0].float()
            divergence = torch.zeros(len(x), device=x.device)
        else:
            mean, logvar = (value.float() for value in self.vae.posterior(x))
            latent = mean + torch.exp(0.5 * logvar) * self.noise(batch, "posterior", mean)
            divergence = kl(mean, logvar, values=x[0].numel())
            self.report(kl=divergence.mean())
        if self.latent_noise:
            amount = self.latent_noise * batch.uniform("latent_noise amount").to(x.device)
            spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
            latent = latent + amount[:, None, None, None, None] * spread * self.noise(batch, "latent_noise", mean)
        return latent, divergence

    def play(self, batch: VideoBatch, x: Tensor, y: Tensor, divergence: Tensor) -> None:
        """Differentiate both losses of a micro-batch; after the step's last one, update both players."""
        adversary, disc = self.adversary, self.optimizer_factory.disc
        assert adversary is not None and disc is not None
        losses, told = adversary.differentiate(
            self.disc,
            batch,
            x,
            y,
            lambda shown: batch.mean(self.picture(batch, x, shown)),
            rest=self.kl_weight * batch.mean(divergence),
            last=[param for param in self.vae.decoder.parameters() if param.dim() > 1][-1],
            ramp=adversary.ramp(self.global_step, self.max_steps),
            share=1 / self.accumulate,
        )
        self.report(**told)
        for name, loss in losses.items():
            self.losses[name] = self.losses.get(name, 0) + loss
        if self.last_of_step():
            losses, self.losses = self.losses, {}
            skipped = self.take_step(losses, {"the VAE": self.clip, "the discriminator": disc.clip})
            adversary.end_step(self.global_step, learn=not skipped)

    def picture(self, batch: VideoBatch, x: Tensor, y: Tensor) -> Tensor:
        """Return each sample's error `[B]` of pixels `y` against `x`, by what they are and by how they look."""
        error = self.reconstruction(x, y)
        if not self.lpips.on:
            return error
        distance = self.lpips(batch, x, y)
        self.report(lpips=distance.mean())
        return error + self.lpips.weight * distance

    def noise(self, batch: VideoBatch, stream: str, like: Tensor) -> Tensor:
        """Return normal noise of the shape of `like`, each sample's from its own draw."""
        return torch.stack(batch.normal(stream, [like.shape[1:]] * len(like), like.device))

    def reconstruction(self, x: Tensor, y: Tensor) -> Tensor:
        """Return each sample's mean error per pixel value `[B]` of `y` against `x`, `[B, 3, T, H, W]`."""
        error = y - x
        loss = self.l1_weight * error.abs() + self.l2_weight * error.square()
        extra = self.foreground_weight * max(0.0, 1 - self.global_step / (self.foreground_until * self.max_steps))
        if extra > 0:
            loss = loss * (1 + extra * foreground(x))
        total = loss.flatten(1).mean(1)
        if self.gradient_weight:
            across = error.diff(dim=-1).abs().flatten(1).mean(1) + error.diff(dim=-2).abs().flatten(1).mean(1)
            total = total + self.gradient_weight * across
        return total

    def activations(self, plan: Plan, nets: Mapping[str, nn.Module], half: bool) -> int | None:
        return vae_activations(self.factories["vae"], plan, self.crop, half=half)

    def configure_model(self) -> None:
        """Build the nets.

        Raises:
            ConfigError: the encoder is to be frozen as it was initialized; `crop` does not fit the VAE's stride.
        """
        if self.freeze_encoder and "vae" not in self.origins:
            raise ConfigError("freeze_encoder=true: there is no trained encoder to keep; say with init=FOLDER which")
        super().configure_model()
        space = self.vae.stride[1]
        if self.crop % space:
            near = self.crop + -self.crop % space
            raise ConfigError(f"crop={self.crop}: is no multiple of the VAE's stride of {space} pixels; use {near}")
        if self.freeze_encoder:
            self.frozen.freeze(self.vae)

    def configure_optimizers(self) -> Any:
        """Return the optimizer and its schedule; with an adversary, those of the VAE, then the discriminator's."""
        if self.adversary is None:
            return super().configure_optimizers()
        assert self.optimizer_factory.disc is not None
        factories = (self.optimizer_factory, self.vae), (self.optimizer_factory.disc, self.disc)
        return [self.with_schedule(factory, net.named_parameters()) for factory, net in factories]

    def on_train_start(self) -> None:
        self.lpips.prepare(self.device)
        if self.freeze_encoder:
            self.frozen.check(self.vae)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["frozen"] = self.frozen.hash

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.frozen.hash = checkpoint.get("frozen", "")

    @torch.no_grad()
    def finalize(self) -> None:
        """Set the latents' mean and covariance, over micro-batches that follow those trained on.

        With a frozen encoder they stay, and it is made sure that they have.
        """
        if self.freeze_encoder:
            self.frozen.check(self.vae)
            return
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        batches, hidden = islice(iter(loader), self.statistics_batches), not self.trainer.is_global_zero
        self.set_statistics(track(batches, "latent statistics", total=self.statistics_batches, disable=hidden))

    def exported(self) -> dict[str, tuple[nn.Module, partial, dict[str, Any]]]:
        """Return the nets as every stage does, the latents' statistics beside the VAE."""
        nets = super().exported()
        vae, factory, extra = nets["vae"]
        return {**nets, "vae": (vae, factory, {**extra, "statistics": self.vae.statistics()})}

    def set_statistics(self, batches: Iterable[VideoBatch]) -> None:
        """Measure the latents' mean and covariance from clips, over all ranks, for the VAE to normalise by.

        Raises:
            DataError: there is no clip.
        """
        self.vae.set_statistics(*measured(self.vae, (batch.to(self.device) for batch in batches)))
