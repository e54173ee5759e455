"""From decoded clips of one size to what is stored of them, and what that will take, counted before a clip is read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from soratrain.batch import to_pixels
from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.manifest import Manifest
from soratrain.errors import ConfigError
from soratrain.models.tiles import LEAST
from soratrain.models.vae import VAE
from soratrain.stages.encoding_parts import LATENT, Part, divide
from soratrain.stages.encoding_rounds import Batch
from soratrain.stages.pace import in_bytes

AROUND = 3500  # bytes a clip takes besides: its K.json, names of tensors, tokens of captions, and what a tar pads
FEATURES = " and the captions' features beside them"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ClipEncoder:
    """How clips are encoded.

    Args:
        tail_frames: numbers of frames, each 1 + 4k, of which a clip's last are encoded standalone, if it has as many.
        dtype: of the stored latents, `bf16` or `fp16`.
        pixels_per_batch: pixels (frames × height × width) encoded at once; a longer clip is encoded in pieces.
        autocast: compute in bf16.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(self, *, tail_frames: Sequence[int], dtype: str, pixels_per_batch: int, autocast: bool) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"stage.job.dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
        for frames in tail_frames:
            if isinstance(frames, bool) or not isinstance(frames, int) or frames < 1 or frames % 4 != 1:
                raise ConfigError(f"stage.job.tail_frames={list(tail_frames)}: {frames} is not 1 + 4k; use 1, 5 or 9")
        if pixels_per_batch < 1:
            raise ConfigError(f"stage.job.pixels_per_batch={pixels_per_batch} must be at least 1")
        self.tails, self.dtype, self.pixels_per_batch = sorted(set(tail_frames)), dtype, pixels_per_batch
        self.autocast = autocast

    def __str__(self) -> str:
        return f"{self.tails}:{self.dtype}"

    def batches(
        self, vae: VAE, manifest: Manifest, assignment: Assignment, shard: int, ranks: int
    ) -> Iterator[tuple[Batch, list[Part]]]:
        """Yield the clips of a source shard, as many of one bucket together as are encoded at once.

        With each come the parts that `ranks` processes make of it; none where one of them encodes it.
        """
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
            mine = members[manifest.shard[members] == shard]
            size = max(1, self.pixels_per_batch // pixels(bucket))
            long = ranks > 1 and pixels(bucket) > self.pixels_per_batch
            parts = divide(vae, bucket, ranks, self.tails) if long else []
            yield from (((bucket, mine[start : start + size]), parts) for start in range(0, len(mine), size))

    @torch.no_grad()
    def __call__(
        self, vae: VAE, videos: Sequence[np.ndarray], device: torch.device, part: Part | None = None
    ) -> list[dict[str, Tensor]]:
        """Return `latent` and the tails of clips of one size, uint8 `[T, H, W, 3]`: stored type, on the CPU.

        Args:
            part: the clips are but what this part of each reads; its own positions are returned.
        """
        if not videos:
            return []
        stacked = torch.from_numpy(np.stack(videos))

        def encode(name: str, video: Tensor) -> Tensor:
            pieces = latents_of(vae, video, device, self.pixels_per_batch)
            latent = torch.cat([piece.to("cpu", DTYPES[self.dtype]) for piece in pieces], dim=2)
            return latent if part is None else part.of(latent, name)

        tails = self._tails(stacked.shape[1]) if part is None or part.ends else []
        with torch.autocast(device.type, torch.bfloat16, enabled=self.autocast):
            found = {LATENT: encode(LATENT, stacked)}
            found |= {name: encode(name, stacked[:, -frames:]) for name, frames in ((f"tail{n}", n) for n in tails)}
        whole = torch.contiguous_format  # of each clip alone, for it may be sent
        return [
            {name: each[place].clone(memory_format=whole) for name, each in found.items()}
            for place in range(len(stacked))
        ]

    def bytes_of(self, vae: VAE, bucket: Bucket) -> int:
        """Return the bytes of the latent and the tails of one clip."""
        time, high, wide = vae.stride
        steps = sum(1 + (frames - 1) // time for frames in (bucket.frames, *self._tails(bucket.frames)))
        numbers = vae.latent_channels * steps * (bucket.height // high) * (bucket.width // wide)
        return numbers * DTYPES[self.dtype].itemsize

    def foretold(self, vae: VAE, manifest: Manifest, assignment: Assignment, *, features: bool) -> str:
        """Return in words how much there is to encode, and what it will take.

        Args:
            features: whether those of a frozen text encoder are stored too, whose size is not known.
        """
        sizes = list(zip(assignment.buckets, map(len, assignment.members), strict=True))
        size, clips = sum(n * self.bytes_of(vae, bucket) for bucket, n in sizes), sum(n for _, n in sizes)
        return (
            f"{clips:,} clips of {len(sizes)} sizes, {in_bytes(size)} of latents, about"
            f" {in_bytes(size + clips * AROUND)} on disk{FEATURES if features else ''};"
            f" {trimmed(manifest, assignment):,} frames beyond each clip's 1 + 4k, at most"
            f" {max(bucket.frames for bucket in assignment.buckets)}, are left out"
        )

    def _tails(self, frames: int) -> list[int]:
        return [count for count in self.tails if count <= frames]


def latents_of(vae: VAE, video: Tensor, device: torch.device, pixels_per_batch: int) -> Iterator[Tensor]:
    """Yield the normalised latent `[B, C, t, h, w]` of clips of one size, uint8 `[B, T, H, W, 3]`; in pieces of time
    where they have more pixels than are encoded at once."""
    _, frames, height, width, _ = video.shape
    step = max(4, pixels_per_batch // (height * width) // 4 * 4)
    if frames <= step + 1 and video[..., 0].numel() <= pixels_per_batch + video[:, 0, ..., 0].numel():
        yield vae.encode(to_pixels(video.to(device)))
        return
    pieces = (to_pixels(piece.to(device)) for piece in video.split(step, dim=1))
    yield from vae.encode_stream(pieces, step, max(pixels_per_batch, LEAST))  # of frames too large even so, tiles


def pixels(bucket: Bucket) -> int:
    """Return the pixels of one clip."""
    return bucket.frames * bucket.height * bucket.width


def pixels_by_shard(manifest: Manifest, assignment: Assignment) -> list[int]:
    """Return the pixels to encode of each source shard."""
    found = np.zeros(len(manifest.shards), dtype=np.int64)
    for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
        found += np.bincount(manifest.shard[members], minlength=len(found)) * pixels(bucket)
    return found.tolist()


def trimmed(manifest: Manifest, assignment: Assignment) -> int:
    """Return how many source frames, of those at the chosen rate, no latent covers."""
    return sum(
        int((1 + (manifest.frames[members] - 1) // assignment.stride[members] - bucket.frames).sum())
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True)
    )
