"""Latents made as training goes, by a VAE that is not trained: nothing is cached, and clips differ each time.

The VAE is none of the stage's nets: no optimizer, average, checkpoint or export knows it, and no strategy cuts it up.
What a clip becomes is what stage=encode would store of it, but for rounding to 16 bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from soratrain.batch import LatentBatch, VideoBatch
from soratrain.errors import ConfigError
from soratrain.models.autoencoders import load_vae
from soratrain.models.patchify import STRIDE
from soratrain.models.vae import VAE
from soratrain.stages.encoding import latents_of


class LiveEncoder:
    """A frozen VAE, loaded when it is first needed.

    Args:
        place: folder of the VAE, or its id on the hub.
        pixels_per_batch: frames × height × width encoded at once; larger clips go in pieces.

    Raises:
        ConfigError: `pixels_per_batch` is no positive number.
    """

    def __init__(self, place: str, pixels_per_batch: int = 1 << 22) -> None:
        if pixels_per_batch < 1:
            raise ConfigError(f"stage.module.pixels_per_batch={pixels_per_batch} must be at least 1")
        self.place, self.pixels_per_batch = place, pixels_per_batch
        self._vae: VAE | None = None

    def load(self, channels: int) -> None:
        """Load the VAE, unless that is done, for a net that takes latents of so many channels.

        Raises:
            ConfigError: it makes others.
            DataError: there is none, or its weights do not fit its config.
        """
        if self._vae is not None:
            return
        vae = load_vae(self.place).requires_grad_(False)
        if vae.latent_channels != channels:
            raise ConfigError(
                f"inputs.vae={self.place}: makes latents of {vae.latent_channels} channels, and the DiT takes"
                f" {channels}; set dit.channels={vae.latent_channels}, or name the VAE by vae="
            )
        if vae.stride[0] != STRIDE[0]:
            raise ConfigError(
                f"inputs.vae={self.place}: has a stride of {vae.stride[0]} in time, and the DiT counts {STRIDE[0]}"
            )
        self._vae = vae

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Return the latents, fp32 `[B, C, t, h, w]`, of clips, uint8 `[B, T, H, W, 3]`, on their device."""
        assert self._vae is not None, "load() comes first"
        vae = self._vae.to(video.device)
        return torch.cat([piece.float() for piece in latents_of(vae, video, video.device, self.pixels_per_batch)], 2)

    def __call__(self, batch: VideoBatch, tails: Sequence[int]) -> LatentBatch:
        """Return a batch of clips as one of latents; its tails are encoded when they are taken."""
        common = {name: getattr(batch, name) for name in vars(batch) if name != "video"}
        ends = tuple(Ends(self, clip, tails) for clip in batch.video)
        return LatentBatch(latents=tuple(self.encode(batch.video)), tails=ends, **common)


class Ends(Mapping[int, Tensor]):
    """A clip's ends by their number of frames, each encoded standalone when it is asked for: most never are."""

    def __init__(self, encoder: LiveEncoder, clip: Tensor, frames: Sequence[int]) -> None:
        self.encoder, self.clip = encoder, clip
        self.frames = tuple(count for count in frames if count <= len(clip))

    def __getitem__(self, frames: int) -> Tensor:
        if frames not in self.frames:
            raise KeyError(frames)
        return self.encoder.encode(self.clip[None, -frames:])[0]

    def __iter__(self) -> Iterator[int]:
        return iter(self.frames)

    def __len__(self) -> int:
        return len(self.frames)
