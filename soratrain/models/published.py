"""Other people's VAEs, as diffusers has them, with the face of our own.

A latent is what diffusers' `encode` gives as its mode, normalised inside by the statistics in its config.

Legend: B samples, C channels, T H W frames, height, width in pixels, t h w the same of the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError
from soratrain.models.layers import State
from soratrain.models.vae import VAE

WHOLE_VALUES = 1 << 30  # pixel values of a clip that cannot be streamed: 4 GB in fp32


class Published(VAE):
    """A VAE of diffusers behind the methods of ours.

    Args:
        net: the model, as diffusers loads it.
        latent_channels: what the config says that it has, or None.

    Raises:
        ConfigError: it has another number of channels, or its config is of a form that is not known here.
    """

    class_name: ClassVar[str]  # in diffusers
    option: ClassVar[str]  # of the group `vae`
    strides: ClassVar[Mapping[int, tuple[int, int, int]]]  # by latent channels, of what is published

    def __init__(self, net: nn.Module, *, latent_channels: int | None = None) -> None:
        nn.Module.__init__(self)  # none of our own layers
        self.net = net
        self.config = plain_config(net)
        self.latent_channels = self.channels_in(self.config)
        if latent_channels not in (None, self.latent_channels):
            raise ConfigError(f"vae.latent_channels={latent_channels}: these weights have {self.latent_channels}")
        self.stride = self.stride_in(self.config)
        mean, std = (torch.tensor(values, dtype=torch.float32) for values in self.statistics_in(self.config))
        if mean.shape != (self.latent_channels,) or std.shape != mean.shape or not (std > 0).all():
            raise ConfigError(f"the config of this {self.class_name} has no mean and deviation for each latent channel")
        self.register_buffer("latent_mean", mean)
        self.register_buffer("latent_std", std)
        self.register_buffer("latent_mix", torch.eye(self.latent_channels))
        self.register_buffer("latent_unmix", torch.eye(self.latent_channels))

    @staticmethod
    def channels_in(config: Mapping[str, Any]) -> int:
        """Return the latent's channels."""
        raise NotImplementedError

    @staticmethod
    def stride_in(config: Mapping[str, Any]) -> tuple[int, int, int]:
        """Return pixels per latent position in time, height and width."""
        raise NotImplementedError

    @staticmethod
    def statistics_in(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        """Return mean and deviation of each latent channel."""
        raise NotImplementedError

    def tiles(self, part: str, x: Tensor, frames: int, budget: int | None) -> None:
        """Return None: a step is fewer frames where they are large, but never a part of one."""


class Wan(Published):
    """AutoencoderKLWan: 16 channels at 4 x 8 x 8, or, as of Wan 2.2, 48 at 4 x 16 x 16.

    It carries its past in a cache of features, which is the state between chunks here: 1 frame, then 4 at a time, as
    diffusers takes the whole.
    """

    class_name, option = "AutoencoderKLWan", "wan"
    strides: ClassVar = {16: (4, 8, 8), 48: (4, 16, 16)}

    def __init__(self, net: nn.Module, *, latent_channels: int | None = None) -> None:
        super().__init__(net, latent_channels=latent_channels)
        from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, patchify, unpatchify

        self.patchify, self.unpatchify = patchify, unpatchify
        self.caches = {
            name: sum(isinstance(module, WanCausalConv3d) for module in getattr(net, name).modules())
            for name in ("encoder", "decoder")
        }

    @staticmethod
    def channels_in(config: Mapping[str, Any]) -> int:
        return int(config["z_dim"])

    @staticmethod
    def stride_in(config: Mapping[str, Any]) -> tuple[int, int, int]:
        space = 2 ** (len(config["dim_mult"]) - 1) * (config.get("patch_size") or 1)
        return 2 ** sum(map(bool, config["temperal_downsample"])), space, space

    @staticmethod
    def statistics_in(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        return list(config["latents_mean"]), list(config["latents_std"])

    def encode_chunk(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return `[B, 2C, t, h, w]` (mean, then log variance) of 1 + 4n frames, later of 4n, and the state after."""
        time = self.stride[0]
        if size := self.config.get("patch_size"):
            x = self.patchify(x, patch_size=size)
        pieces = x.split(time, dim=2) if state is not None else (x[:, :, :1], *x[:, :, 1:].split(time, dim=2))
        cache = self.cache("encoder", state)
        encoder: Any = self.net.encoder
        found = [encoder(piece, feat_cache=cache, feat_idx=[0]) for piece in pieces if piece.shape[2]]
        return self.net.quant_conv(torch.cat(found, dim=2)), tuple(cache)  # type: ignore[operator]

    def decode_chunk(self, latent: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return pixels in [-1, 1] of latents that are not normalised, and the state that the next chunk needs."""
        decoder: Any = self.net.decoder
        z, cache, found = self.net.post_quant_conv(latent), self.cache("decoder", state), []  # type: ignore[operator]
        for index in range(z.shape[2]):
            first = {"first_chunk": True} if state is None and index == 0 else {}
            found.append(decoder(z[:, :, index : index + 1], feat_cache=cache, feat_idx=[0], **first))
        y = torch.cat(found, dim=2)
        if size := self.config.get("patch_size"):
            y = self.unpatchify(y, patch_size=size)
        return y.clamp(-1.0, 1.0), tuple(cache)

    def cache(self, part: str, state: State) -> list[Any]:
        """Return a cache that a part may change: of what came before, or an empty one."""
        return [None] * self.caches[part] if state is None else list(state)


class CogVideoX(Published):
    """AutoencoderKLCogVideoX: 16 channels at 4 x 8 x 8.

    Its GroupNorm sees the frames that are worked on together, and how diffusers cuts a clip (8 frames, or 2 latent
    frames, and what is left over with the first) depends on its length. So a clip is always given as a whole; that cut
    bounds its memory. Of an even number of latent frames diffusers' decoder shows the first four times: the last is
    kept.
    """

    class_name, option = "AutoencoderKLCogVideoX", "cogvideox"
    strides: ClassVar = {16: (4, 8, 8)}

    @staticmethod
    def channels_in(config: Mapping[str, Any]) -> int:
        return int(config["latent_channels"])

    @staticmethod
    def stride_in(config: Mapping[str, Any]) -> tuple[int, int, int]:
        space = 2 ** (len(config["block_out_channels"]) - 1)
        return int(config["temporal_compression_ratio"]), space, space

    @staticmethod
    def statistics_in(config: Mapping[str, Any]) -> tuple[list[float], list[float]]:
        channels, scale = int(config["latent_channels"]), float(config["scaling_factor"])
        mean = config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels
        return list(mean), [std / scale for std in config.get("latents_std") or [1.0] * channels]

    def encode_chunk(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return `[B, 2C, t, h, w]` (mean, then log variance) of a whole clip."""
        assert state is None, "this VAE has no chunks"
        return self.net.encode(x).latent_dist.parameters, ()  # type: ignore[operator]

    def decode_chunk(self, latent: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return the pixels of a whole clip's latent that is not normalised."""
        assert state is None, "this VAE has no chunks"
        frames = 1 + (latent.shape[2] - 1) * self.stride[0]
        return self.net.decode(latent).sample[:, :, -frames:], ()  # type: ignore[operator]

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[Tensor], frames_per_step: int = 16, pixels_per_step: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the normalised latent of one clip, in one piece.

        Raises:
            ConfigError: the size does not fit the stride, or the clip is too large to be held.
        """
        yield self.encode(gathered(chunks))

    @torch.no_grad()
    def decode_stream(
        self, chunks: Iterable[Tensor], latents_per_step: int = 4, pixels_per_step: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the pixels of one clip, in one piece.

        Raises:
            ConfigError: the clip is too large to be held.
        """
        latent = gathered(chunks, values=3 * self.stride[0] * self.stride[1] * self.stride[2] // self.latent_channels)
        yield self.decode(latent)


KINDS: tuple[type[Published], ...] = (Wan, CogVideoX)


def gathered(chunks: Iterable[Tensor], values: int = 1) -> Tensor:
    """Return chunks of a clip as one; `values`: how many pixel values each of their numbers stands for."""
    held: list[Tensor] = []
    for chunk in chunks:
        held.append(chunk)
        if (size := values * sum(part.numel() for part in held)) > WHOLE_VALUES:
            raise ConfigError(
                f"a clip of more than {size // 3:,} pixels cannot go through CogVideoX's VAE, which takes a clip as a"
                " whole; bound buckets.max_size and max_frames, or use a VAE that streams (vae=wan, or one of ours)"
            )
    return torch.cat(held, dim=2)


def plain_config(net: nn.Module) -> dict[str, Any]:
    """Return a diffusers model's config without the names that begin with `_`, which tell where it came from."""
    return {key: value for key, value in dict(net.config).items() if not key.startswith("_")}  # type: ignore[arg-type]
