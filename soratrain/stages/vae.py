"""stage=vae: train the autoencoder from scratch on clips and images, then measure its latents' statistics."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.batch import VideoBatch, to_pixels
from soratrain.errors import ConfigError, DataError
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage
from soratrain.stages.vae_losses import foreground, kl


class VAEStage(TrainStage):
    """Reconstruction, plus weighted KL divergence from a standard normal; both as nats-like sums per pixel value.

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

    Raises:
        ConfigError: a weight is negative, none of the reconstruction weights is positive, or a fraction is not one.
    """

    vae: VAE

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
    ) -> None:
        super().__init__(nets={"vae": net}, optimizer=optimizer, schedule=schedule, max_steps=max_steps)
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
        self.crop = crop
        self.l1_weight, self.l2_weight, self.gradient_weight = l1_weight, l2_weight, gradient_weight
        self.kl_weight, self.latent_noise = kl_weight, latent_noise
        self.foreground_weight, self.foreground_until = foreground_weight, foreground_until
        self.statistics_batches = statistics_batches

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch.

        Raises:
            ConfigError: the clips' size does not fit the VAE's stride.
        """
        x = to_pixels(random_crop(batch, self.crop)) if self.crop else batch.pixels()
        mean, logvar = self.vae.posterior(x)
        mean, logvar = mean.float(), logvar.float()
        latent = mean + torch.exp(0.5 * logvar) * self.noise(batch, "posterior", mean)
        if self.latent_noise:
            amount = self.latent_noise * batch.uniform("latent_noise amount").to(x.device)
            spread = mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
            latent = latent + amount[:, None, None, None, None] * spread * self.noise(batch, "latent_noise", mean)
        y = self.vae.decode_chunk(latent)[0].float()
        rebuilt, divergence = self.reconstruction(x, y), kl(mean, logvar, values=x[0].numel())
        loss = batch.mean(rebuilt + self.kl_weight * divergence)
        psnr = -10 * torch.log10((y.detach() - x).square().flatten(1).mean(1) / 4 + 1e-10)
        self.report(loss=loss, kl=divergence.mean(), psnr=psnr.mean(), samples=len(batch), frames=x.shape[2] * len(x))
        return loss

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

    @torch.no_grad()
    def finalize(self) -> None:
        """Set the latents' mean and covariance, over micro-batches that follow those trained on."""
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        self.set_statistics(islice(iter(loader), self.statistics_batches))

    @torch.no_grad()
    def set_statistics(self, batches: Iterable[VideoBatch]) -> None:
        """Measure the latents' mean and covariance from clips, over all ranks, for the VAE to normalise by.

        Raises:
            DataError: there is no clip.
        """
        channels = self.vae.latent_channels
        totals = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=self.device)
        for batch in batches:
            mean = self.vae.posterior(batch.to(self.device).pixels())[0].double().transpose(0, 1).flatten(1)
            mean = torch.cat((mean, torch.ones_like(mean[:1])))  # its last row and column sum the others, and count
            totals += mean @ mean.T
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(totals)
        count = totals[-1, -1]
        if not count > 1:
            raise DataError("no clip from which to measure the latents' statistics; the data have no batch left")
        average = totals[-1, :-1] / count
        self.vae.set_statistics(average, totals[:-1, :-1] / count - torch.outer(average, average))


def random_crop(batch: VideoBatch, size: int) -> Tensor:
    """Return `[B, T, h, w, 3]`, h and w at most `size`, cut out of each clip where its draw says."""
    _, _, height, width, _ = batch.video.shape
    h, w = min(size, height), min(size, width)
    tops = (batch.uniform("crop top") * (height - h + 1)).long().tolist()
    lefts = (batch.uniform("crop left") * (width - w + 1)).long().tolist()
    parts = zip(batch.video, tops, lefts, strict=True)
    return torch.stack([video[:, top : top + h, left : left + w] for video, top, left in parts])
