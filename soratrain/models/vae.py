"""The causal video autoencoder: 1 + 4k frames become 1 + k latent frames, 8 × 8 pixels one latent position.

Every operation is local and causal and carries its state explicitly (layers.py), so a clip of any length is encoded
or decoded chunk by chunk with the same numbers as in one piece, and memory does not grow with duration. There is no
attention and no GroupNorm, whose statistics would depend on where the cuts fall. An image is a video of one frame.

Legend: B samples, C channels, T H W frames, height, width in pixels, t h w the same of the latent.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain as chain_of
from itertools import islice

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError
from soratrain.models.layers import CausalConv3d, Chain, Down, Front, Head, ResidualBlock, State, Up, again
from soratrain.models.tiles import Tiles

SMALLEST_SHARE = 0.01  # a direction with less of a channel's variance is noise, and is not raised to 1


class VAE(nn.Module):
    """Causal 3D convolutional variational autoencoder.

    Level i works with `channels[i]` channels; between levels i and i+1 time and space shrink by `time_strides[i]` and
    `space_strides[i]`, after the front has shrunk them by `front_strides`; the products are the VAE's stride.

    Args:
        latent_channels: C of the latent.
        channels: width of each level, from pixels to latent.
        time_strides, space_strides: 1 or 2, one fewer than levels.
        encoder_blocks, decoder_blocks: residual blocks at each level.
        time_kernels: kernel length in time of each level's blocks and of the upsampling into it: 1 (each frame alone)
            or 3.
        front: `none`, `space_to_depth` or `haar`; `front_strides`: its factors in time and space.
        recompute: what training computes twice to keep less: `none`, `blocks` or `levels` (see `Chain`).
        chunk_frames: training keeps, of a clip of more frames, only the states between chunks of so many and computes
            each chunk again in the backward pass, with the whole clip's gradients; 0: the clip is one chunk.

    Attributes:
        stride: (time, height, width), pixels per latent position.
        latent_mean, latent_std: `[C]` buffers by which `encode` and `decode` normalise.
        latent_mix, latent_unmix: `[C, C]` buffers, each the other's inverse, which then take the channels' correlations
            out and put them back. What channels share is mostly colour and background; left in, it drowns shape and
            motion in a diffusion model's loss.

    Raises:
        ConfigError: lists of unequal length, or values that do not go together.
    """

    latent_mean: Tensor
    latent_std: Tensor
    latent_mix: Tensor
    latent_unmix: Tensor

    def __init__(
        self,
        *,
        latent_channels: int = 16,
        channels: Sequence[int],
        time_strides: Sequence[int],
        space_strides: Sequence[int],
        encoder_blocks: Sequence[int],
        decoder_blocks: Sequence[int],
        time_kernels: Sequence[int],
        front: str = "space_to_depth",
        front_strides: Sequence[int] = (1, 2),
        recompute: str = "none",
        chunk_frames: int = 0,
    ) -> None:
        super().__init__()
        levels = len(channels)
        for name, values, length, allowed in (
            ("time_strides", time_strides, levels - 1, (1, 2)),
            ("space_strides", space_strides, levels - 1, (1, 2)),
            ("encoder_blocks", encoder_blocks, levels, range(100)),
            ("decoder_blocks", decoder_blocks, levels, range(100)),
            ("time_kernels", time_kernels, levels, (1, 3)),
        ):
            if len(values) != length or any(value not in allowed for value in values):
                raise ConfigError(
                    f"vae.{name}={list(values)} needs {length} numbers of {list(allowed)[:3]} for {levels} channels"
                )
        self.latent_channels = latent_channels
        time, space = front_strides
        self.front = Front(kind=front, time=time, space=space)
        pixel_channels = 3 * time * space**2
        for time_stride, space_stride in zip(time_strides, space_strides, strict=True):
            time, space = time * time_stride, space * space_stride
        self.stride = (time, space, space)
        if recompute not in ("none", "blocks", "levels"):
            raise ConfigError(f"vae.recompute={recompute!r} is unknown; use none, blocks or levels")
        if chunk_frames < 0 or chunk_frames % time:
            near = max(1, -(-chunk_frames // time)) * time
            raise ConfigError(f"vae.chunk_frames={chunk_frames} is not a multiple of {time}; use {near}, or 0 for none")
        self.chunk_frames = chunk_frames

        kernels = [(kernel, 3, 3) for kernel in time_kernels]
        down: list[nn.Module] = [CausalConv3d(in_channels=pixel_channels, out_channels=channels[0], kernel=kernels[0])]
        up: list[nn.Module] = [CausalConv3d(in_channels=latent_channels, out_channels=channels[-1])]
        for i in range(levels):
            down += [ResidualBlock(channels=channels[i], kernel=kernels[i]) for _ in range(encoder_blocks[i])]
            if i < levels - 1:
                factors = {"time": time_strides[i], "space": space_strides[i]}
                down.append(Down(in_channels=channels[i], out_channels=channels[i + 1], **factors))
        for i in reversed(range(levels)):
            up += [ResidualBlock(channels=channels[i], kernel=kernels[i]) for _ in range(decoder_blocks[i])]
            if i > 0:
                factors = {"time": time_strides[i - 1], "space": space_strides[i - 1]}
                up.append(Up(in_channels=channels[i], out_channels=channels[i - 1], kernel=kernels[i - 1], **factors))
        down.append(Head(in_channels=channels[-1], out_channels=2 * latent_channels))
        up.append(Head(in_channels=channels[0], out_channels=pixel_channels, kernel=kernels[0]))
        self.encoder, self.decoder = Chain(down, recompute), Chain(up, recompute)
        self.register_buffer("latent_mean", torch.zeros(latent_channels))
        self.register_buffer("latent_std", torch.ones(latent_channels))
        self.register_buffer("latent_mix", torch.eye(latent_channels))
        self.register_buffer("latent_unmix", torch.eye(latent_channels))

    def check_size(self, frames: int, height: int, width: int) -> None:
        """Raise ConfigError, naming the nearest sizes, unless a whole clip of this size can be encoded."""
        time, space, _ = self.stride
        if frames < 1 or (frames - 1) % time:
            below = max(frames - 1, 0) // time * time + 1
            raise ConfigError(f"{frames} frames are not 1 + {time}k; trim to {below} or extend to {below + time}")
        for name, size in (("height", height), ("width", width)):
            if size < space or size % space:
                below = size // space * space
                near = f"{below} or {below + space}" if below else f"{space}"
                raise ConfigError(f"{name} {size} is not a multiple of {space}; use {near}")

    def posterior(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean and log variance `[B, C, t, h, w]`, not normalised, of pixels `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ConfigError: a size that does not fit the stride.
        """
        self.check_size(*x.shape[2:])
        mean, logvar = self.encode_chunk(x)[0].chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode_chunk(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return `[B, 2C, t, h, w]` (mean, then log variance) of a chunk, and the state that the next one needs.

        The first chunk (`state=None`) has 1 + 4n frames, later ones 4n.
        """
        return in_chunks(self.encoder, self.front(x, state is None), state, self.chunk_frames // self.front.time)

    def decode_chunk(self, latent: Tensor, state: State = None) -> tuple[Tensor, State]:
        """Return pixels of a chunk of latents that are not normalised, and the state that the next one needs."""
        y, after = in_chunks(self.decoder, latent, state, self.chunk_frames // self.stride[0])
        return self.front.inverse(y, state is None), after

    def normalise(self, latent: Tensor) -> Tensor:
        """Return the latent with mean 0, variance 1 and uncorrelated channels, fp32, under autocast too."""
        shape = (-1, 1, 1, 1)
        with torch.autocast(latent.device.type, enabled=False):
            latent = (latent.float() - self.latent_mean.view(shape)) / self.latent_std.view(shape)
            return torch.einsum("dc,bcthw->bdthw", self.latent_mix, latent)

    def denormalise(self, latent: Tensor) -> Tensor:
        """Undo `normalise`."""
        shape = (-1, 1, 1, 1)
        with torch.autocast(latent.device.type, enabled=False):
            latent = torch.einsum("dc,bcthw->bdthw", self.latent_unmix, latent.float())
            return latent * self.latent_std.view(shape) + self.latent_mean.view(shape)

    def set_statistics(self, mean: Tensor, covariance: Tensor) -> None:
        """Make latents of this mean `[C]` and covariance `[C, C]` uncorrelated and of variance 1.

        The mix is the inverse root of the correlations, which keeps every channel as close to itself as can be
        (ZCA-cor: Kessy et al., 2018).
        """
        std = covariance.diagonal().clamp(min=1e-12).sqrt()
        values, vectors = torch.linalg.eigh(covariance / std[:, None] / std)
        roots = values.clamp(min=SMALLEST_SHARE).sqrt()
        self.latent_mean.copy_(mean)
        self.latent_std.copy_(std)
        self.latent_mix.copy_((vectors / roots) @ vectors.T)
        self.latent_unmix.copy_((vectors * roots) @ vectors.T)

    def statistics(self) -> dict[str, list[float]]:
        """Return the channels' mean and deviation as plain numbers, to be read beside the weights, which hold them."""
        found = {"mean": self.latent_mean, "std": self.latent_std}
        return {name: [round(float(value), 6) for value in values] for name, values in found.items()}

    def encode(self, x: Tensor) -> Tensor:
        """Return the normalised latent `[B, C, t, h, w]`, fp32, of pixels `[B, 3, T, H, W]` in [-1, 1].

        Raises:
            ConfigError: a size that does not fit the stride.
        """
        return self.normalise(self.posterior(x)[0])

    def decode(self, latent: Tensor) -> Tensor:
        """Return pixels `[B, 3, T, H, W]`, about [-1, 1], of a normalised latent `[B, C, t, h, w]`."""
        return self.decode_chunk(self.denormalise(latent))[0]

    @torch.no_grad()
    def encode_stream(
        self, chunks: Iterable[Tensor], frames_per_step: int = 16, pixels_per_step: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the normalised latent of one long clip piece by piece, the same numbers as `encode` of the whole.

        Args:
            chunks: pixels `[B, 3, any, H, W]`, in order, any number of frames each.
            frames_per_step: frames worked on at once, which bounds memory; rounded up to the time stride.
            pixels_per_step: most pixels (samples x frames x height x width) worked on at once: fewer frames a step
                where they are too large, and tiles where even the fewest are (see `Tiles`).

        Raises:
            ConfigError: the size does not fit the stride, the frames in all are not 1 + 4k, or the budget is less than
                the smallest tile takes.
        """
        seen, state, tiles = 0, None, None
        shape, chunks = peek(chunks)
        step = self.frames_of_step(shape[0] * shape[3] * shape[4], frames_per_step, pixels_per_step)
        for x in regroup(chunks, first=1, step=step):
            self.check_size(1 if seen else x.shape[2], *x.shape[3:])
            seen += x.shape[2]
            self.check_size(seen, *x.shape[3:])
            tiles = tiles or self.tiles("encoder", x, len(x) * step, pixels_per_step)
            y, state = tiles(self.front(x, state is None), state) if tiles else self.encode_chunk(x, state)
            yield self.normalise(y[:, : self.latent_channels])

    @torch.no_grad()
    def decode_stream(
        self, chunks: Iterable[Tensor], latents_per_step: int = 4, pixels_per_step: int | None = None
    ) -> Iterator[Tensor]:
        """Yield the pixels of one long clip piece by piece, the same numbers as `decode` of the whole.

        Args:
            chunks: normalised latents `[B, C, any, h, w]`, in order.
            latents_per_step: latent frames worked on at once, which bounds memory.
            pixels_per_step: as in `encode_stream`, of the pixels that come out.

        Raises:
            ConfigError: the budget is less than the smallest tile takes.
        """
        time, space, _ = self.stride
        state, tiles = None, None
        shape, chunks = peek(chunks)
        step = self.frames_of_step(shape[0] * shape[3] * shape[4] * space**2, latents_per_step * time, pixels_per_step)
        for latent in regroup(chunks, first=1, step=step // time):
            tiles = tiles or self.tiles("decoder", latent, len(latent) * step, pixels_per_step)
            first, latent = state is None, self.denormalise(latent)
            y, state = tiles(latent, state) if tiles else self.decode_chunk(latent, state)
            yield self.front.inverse(y, first) if tiles else y

    def frames_of_step(self, pixels: int, frames: int, budget: int | None) -> int:
        """Return how many frames of so many `pixels` a step takes: whole strides, about `frames` at most."""
        time = self.stride[0]
        most = -(-frames // time) if budget is None else min(-(-frames // time), budget // max(1, pixels * time))
        return max(1, most) * time

    def tiles(self, part: str, x: Tensor, frames: int, budget: int | None) -> Tiles | None:
        """Return `encoder` or `decoder` with its levels cut into tiles where a step of `frames` exceeds the budget.

        Without a budget there are none. `x` is what it is to be given, pixels not yet through the front.
        """
        if budget is None:
            return None
        encodes = part == "encoder"
        time, space = (self.front.time, self.front.space) if encodes else self.stride[:2]
        return Tiles(
            self.encoder if encodes else self.decoder,
            scale=Fraction(1, space),
            volume=Fraction(1, time * space**2),
            height=x.shape[3] // (space if encodes else 1),
            width=x.shape[4] // (space if encodes else 1),
            frames=frames,
            pixels=budget,
        )


def in_chunks(net: Chain, x: Tensor, state: State, step: int) -> tuple[Tensor, State]:
    """Return `net(x, state)`; where a gradient is wanted, `step` frames at a time, keeping the states between alone."""
    if not step or not torch.is_grad_enabled() or x.shape[2] <= step + (state is None):
        return net(x, state)
    pieces = []
    for part in regroup([x], first=step + (state is None), step=step):
        y, state = again(net, part, state)
        pieces.append(y)
    return torch.cat(pieces, dim=2), state


def peek(chunks: Iterable[Tensor]) -> tuple[Sequence[int], Iterator[Tensor]]:
    """Return the shape of the first of the chunks, and all of them; zeros where there is none."""
    rest = iter(chunks)
    head = list(islice(rest, 1))
    return head[0].shape if head else (0,) * 5, chain_of(head, rest)


def regroup(chunks: Iterable[Tensor], *, first: int, step: int) -> Iterator[Tensor]:
    """Yield the same frames (dim 2) again, `first` of them, then `step` at a time, then what is left."""
    waiting: list[Tensor] = []
    count, wanted = 0, first
    for chunk in chunks:
        waiting.append(chunk)
        count += chunk.shape[2]
        while count >= wanted:
            joined = torch.cat(waiting, dim=2) if len(waiting) > 1 else waiting[0]
            yield joined[:, :, :wanted]
            count -= wanted
            waiting = [joined[:, :, wanted:]] if count else []
            wanted = step
    if count:
        yield torch.cat(waiting, dim=2)
