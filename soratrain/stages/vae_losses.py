"""What the autoencoder is judged by, as pure functions of pixels, latents and logits; each gives one number a sample.

All are means per pixel value or per logit, so that their balance does not change with a clip's size.

Legend: B samples, T frames, H height, W width, C channels; logits are `[B, 1, t, h, w]`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from soratrain.batch import Batch, keyed_uniform
from soratrain.distributed import halt
from soratrain.errors import ConfigError
from soratrain.models.lpips import LPIPS, load_lpips

log = logging.getLogger(__name__)

FOREGROUND = 0.1  # a pixel is foreground where it is this far (of [-1, 1]) from its clip's median colour


def kl(mean: Tensor, logvar: Tensor, values: int) -> Tensor:
    """Return the divergence of N(mean, exp(logvar)) from N(0, 1), in nats, over a sample's number of pixel `values`.

    Dividing by pixel values, as the reconstruction does, keeps the balance of the two the same for every clip size.
    """
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).sum(1) / values


def foreground(x: Tensor) -> Tensor:
    """Return 1 where a pixel of `[B, 3, T, H, W]` is far from its clip's median colour, else 0: `[B, 1, T, H, W]`."""
    background = x.flatten(2).median(dim=2).values[:, :, None, None, None]
    return ((x - background).abs().amax(dim=1, keepdim=True) > FOREGROUND).to(x.dtype)


def per_sample(logits: Tensor) -> Tensor:
    """Return each sample's mean logit `[B]`."""
    return logits.flatten(1).mean(1)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Return the discriminator's loss `[B]`, half of what real logits below 1 and fake ones above -1 lack.

    Lim & Ye, "Geometric GAN", 2017, halved as in VQGAN (Esser et al., 2021): 1 where it can tell nothing.
    """
    return 0.5 * (per_sample(F.relu(1 - real)) + per_sample(F.relu(1 + fake)))


def lecam(real: Tensor, fake: Tensor, real_mean: Tensor, fake_mean: Tensor) -> Tensor:
    """Return how far logits have left each other behind `[B]`: real ones above the running mean of fake ones, and
    fake ones below that of real ones, squared.

    Tseng et al., "Regularizing GANs under Limited Data", 2021, one-sided as in their code.
    """
    return per_sample(F.relu(real - fake_mean).square()) + per_sample(F.relu(real_mean - fake).square())


def balance(reconstruction: Tensor, generator: Tensor, most: float) -> Tensor:
    """Return the weight that gives the generator's loss a gradient as large as the reconstruction's, at most `most`.

    Args:
        reconstruction, generator: gradients of both losses at the decoder's last layer (VQGAN: Esser et al., 2021).
    """
    return (reconstruction.norm() / (generator.norm() + 1e-8)).clamp(max=most)


class Perceptual:
    """LPIPS of some frames of each clip, where its weights are given; it is no module, so that no checkpoint has it.

    Args:
        vgg, lin: the weights' files (see `models/lpips.py`); without them it is off.
        weight: of the distance in the loss; 0 turns it off.
        frames: most frames of a clip that are compared; each sample draws its own.

    Raises:
        ConfigError: one file without the other, or one that is not there; a value out of range.
    """

    def __init__(self, *, vgg: str | None = None, lin: str | None = None, weight: float = 1.0, frames: int = 4) -> None:
        if weight < 0 or frames < 1:
            raise ConfigError(f"lpips.weight={weight} must be at least 0 and lpips.frames={frames} at least 1")
        if (vgg is None) != (lin is None):
            raise ConfigError(f"lpips.vgg={vgg}, lpips.lin={lin}: LPIPS needs both files; give both, or neither")
        for key, file in (("vgg", vgg), ("lin", lin)):
            if file is not None and not Path(file).is_file():
                raise ConfigError(f"lpips.{key}={file}: there is no such file; give another path, or null for no LPIPS")
        self.vgg, self.lin, self.weight, self.frames = vgg, lin, weight, frames
        self.net: LPIPS | None = None

    @property
    def on(self) -> bool:
        """Whether it takes part in the loss."""
        return self.weight > 0 and self.vgg is not None

    def prepare(self, device: torch.device) -> None:
        """Load the weights, or say that there are none."""
        if self.on and self.net is None:
            assert self.vgg is not None and self.lin is not None
            self.net = load_lpips(self.vgg, self.lin).to(device)
        elif self.weight > 0 and self.vgg is None and halt.speaks():
            log.info("LPIPS is off: lpips.vgg and lpips.lin name no weights")

    def __call__(self, batch: Batch, x: Tensor, y: Tensor) -> Tensor:
        """Return each sample's distance `[B]`, the mean of its drawn frames', of `[B, 3, T, H, W]`."""
        assert self.net is not None, "prepare() comes first"
        count = min(self.frames, x.shape[2])
        chosen = list(drawn_frames(batch, x.shape[2], count))
        pairs = (torch.cat([z[b, :, index].transpose(0, 1) for b, index in enumerate(chosen)]) for z in (x, y))
        return self.net(*pairs).view(len(x), count).mean(1)


def drawn_frames(batch: Batch, frames: int, count: int) -> Iterable[Tensor]:
    """Yield for each sample `count` different numbers below `frames`, which its draw alone decides."""
    for draw in batch.draws.tolist():
        yield keyed_uniform(int(draw), "lpips frames", (frames,)).argsort()[:count]
