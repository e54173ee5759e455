"""What decides the autoencoder's latents: the encoder's weights, and the statistics by which latents are normalised."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.batch import VideoBatch
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.vae import VAE


@torch.no_grad()
def measured(vae: VAE, batches: Iterable[VideoBatch]) -> tuple[Tensor, Tensor]:
    """Return the mean `[C]` and covariance `[C, C]` of the latents of clips, over all ranks; collective.

    Raises:
        DataError: there is no clip.
    """
    channels, device = vae.latent_channels, vae.latent_mean.device
    totals = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=device)
    for batch in batches:
        mean = vae.posterior(batch.pixels())[0].double().transpose(0, 1).flatten(1)
        mean = torch.cat((mean, torch.ones_like(mean[:1])))  # its last row and column sum the others, and count
        totals += mean @ mean.T
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(totals)
    count = totals[-1, -1]
    if not count > 1:
        raise DataError("no clip from which to measure the latents' statistics; the data have no batch left")
    average = totals[-1, :-1] / count
    return average, totals[:-1, :-1] / count - torch.outer(average, average)


def encoder_hash(vae: VAE) -> str:
    """Return the SHA-256 of everything that decides a latent: the encoder's weights and the statistics."""
    return weights.digest(vae, without="decoder.")


class FrozenEncoder:
    """An encoder that is not trained, and must not move: what is cached was made with it.

    Attributes:
        hash: of the encoder at the run's start, once that is known; it belongs into checkpoints.
    """

    def __init__(self) -> None:
        self.hash = ""

    def freeze(self, vae: VAE) -> None:
        """Leave the decoder alone to be trained."""
        vae.requires_grad_(False)
        vae.decoder.requires_grad_(True)
        vae.encoder.eval()

    def check(self, vae: VAE) -> None:
        """Compare encoder and statistics with what they were at the run's start.

        Raises:
            ConfigError: this process does not hold the whole encoder.
            DataError: they have moved.
        """
        if any(hasattr(param, "ds_id") for param in vae.encoder.parameters()):
            raise ConfigError("freeze_encoder=true, strategy=zero3: no rank holds the encoder whole; use ddp or zero2")
        now = encoder_hash(vae)
        if self.hash and now != self.hash:
            raise DataError(
                f"the frozen encoder has changed (SHA-256 {now[:12]}, {self.hash[:12]} at the start), so that cached"
                " latents would no longer fit; start over with fresh=true"
            )
        self.hash = now
