"""Map-style datasets: item i is the i-th micro-batch of one rank, read, decoded and stacked.

All that is random about a sample is keyed on (seed, step, sample key), so neither rank nor worker changes it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from soratrain.batch import Batch, LatentBatch, VideoBatch, draw_of
from soratrain.data.ahead import ReadAhead, Reader
from soratrain.data.assignment import Bucket
from soratrain.data.captions import CaptionMix, Choice, captions_of, text_name
from soratrain.data.decode import ByteBudget, Window, crop, load_clip, load_whole, pick, scaled_size
from soratrain.data.fitting import TIME
from soratrain.data.manifest import Manifest
from soratrain.data.members import open_shards, range_of, read_members
from soratrain.data.plan import Micro, Plan
from soratrain.data.quarantine import Quarantine
from soratrain.data.remote import Range, Remote
from soratrain.errors import DataError

ATTEMPTS = 16  # substitutes tried for one unreadable sample


@dataclass(frozen=True)
class Sample:
    """One sample, ready to be stacked; `payload` is its frames or tensors."""

    payload: Any
    fps: float
    key: str
    caption: Choice
    draw: int


class Source(Protocol):
    """A kind of sample: how it is read, and how samples become a batch."""

    manifest: Manifest
    reader: Reader

    def cached(self, index: int, bucket: Bucket) -> bool:
        """Return whether a sample is in memory, so that its bytes are not needed."""
        ...

    def load(self, index: int, bucket: Bucket, draw: int) -> tuple[Any, float, list[dict[str, Any]]]:
        """Return payload, frames a second and the captions in K.json. Raises DataError where it is damaged."""
        ...

    def stack(self, samples: list[Sample], common: dict[str, Any]) -> Batch: ...


class ClipSource:
    """Clips and images from shards of media.

    Args:
        manifest: of the shards.
        stride: every how many source frames one is taken, [N].
        cache: bytes of decoded clips to keep in memory; small clips are then decoded once.
        remote: how shards in a store are read.
        strides: factors of `stride` among which each draw chooses, 1 and others, ascending.
    """

    def __init__(
        self,
        manifest: Manifest,
        stride: np.ndarray,
        cache: int = 0,
        remote: Remote | None = None,
        strides: Sequence[int] = (1,),
    ) -> None:
        self.manifest, self.stride, self.cache, self.strides = manifest, stride, ByteBudget(cache), strides
        self.reader = open_shards(manifest, remote)

    def cached(self, index: int, bucket: Bucket) -> bool:
        """Return whether a clip is in memory at the bucket's size."""
        return self.cache.get((index, bucket.height, bucket.width)) is not None

    def load(self, index: int, bucket: Bucket, draw: int) -> tuple[np.ndarray, float, list[dict[str, Any]]]:
        """Return uint8 `[T, H, W, 3]` of the bucket's size."""
        stride = self.drawn_stride(index, bucket, draw)
        name = index, bucket.height, bucket.width
        kept = self.cache.get(name)
        if kept is None:
            row = self.manifest.row(index)
            header, media = read_members(self.reader, row)
            captions, fps = captions_of(header), Fraction(row.fps_num, max(row.fps_den, 1))
            height, width = scaled_size(row.h, row.w, bucket)
            if self.cache.room(size := row.frames * height * width * 3):
                with contextlib.suppress(DataError):  # damaged, but perhaps not where this draw looks
                    kept = load_whole(media, fps=fps, frames=row.frames, bucket=bucket), float(fps), captions
                    self.cache.put(name, kept, size)
            if kept is None:
                clip = load_clip(media, fps=fps, frames=row.frames, bucket=bucket, stride=stride, draw=draw)
                return clip, float(fps) / stride, captions
        whole, fps, captions = kept
        window = Window.of(len(whole), bucket, stride, draw)
        return crop(window.of_frames(whole), bucket, draw), fps / stride, captions

    def drawn_stride(self, index: int, bucket: Bucket, draw: int) -> int:
        """Return every how many source frames one is taken: its bucket's stride times a factor that fits the clip."""
        stride = int(self.stride[index])
        span = (bucket.frames - 1) * stride
        last = int(self.manifest.frames[index]) - 1
        fitting = [factor for factor in self.strides if factor == 1 or 0 < span * factor <= last]
        return stride * fitting[pick(draw, "stride", len(fitting))]

    def stack(self, samples: list[Sample], common: dict[str, Any]) -> VideoBatch:
        """Return the samples as one array."""
        return VideoBatch(video=torch.from_numpy(np.stack([sample.payload for sample in samples])), **common)


class LatentSource:
    """Cached latents.

    Args:
        manifest: of the latents' shards.
        cache: bytes of latents to keep in memory.
        remote: how shards in a store are read.
        tails: frames of the ends, encoded standalone, that are handed on where they are stored.
    """

    def __init__(
        self, manifest: Manifest, cache: int = 0, remote: Remote | None = None, tails: Sequence[int] = ()
    ) -> None:
        self.manifest, self.cache, self.tails = (
            manifest,
            ByteBudget(cache),
            {frames: f"tail{frames}" for frames in tails},
        )
        self.reader = open_shards(manifest, remote)

    def cached(self, index: int, bucket: Bucket) -> bool:
        """Return whether a latent is in memory."""
        return self.cache.get(index) is not None

    def load(self, index: int, bucket: Bucket, draw: int) -> tuple[dict[str, Tensor], float, list[dict[str, Any]]]:
        """Return the sample's tensors: `latent` `[C, t, h, w]`, tails, and texts of its captions (`text_name`)."""
        kept = self.cache.get(index)
        if kept is None:
            row = self.manifest.row(index)
            header, media = read_members(self.reader, row)
            try:
                stored = safetensors.torch.load(media)
            except (SafetensorError, ValueError) as error:
                raise DataError(f"is not a safetensors file: {error}") from error
            names = {"latent", *self.tails.values()}
            wanted = {name: held for name, held in stored.items() if name in names or name.startswith("text.")}
            tensors = {name: held.float() if name in names else held for name, held in wanted.items()}
            shape = tuple(tensors["latent"].shape[1:]) if "latent" in tensors else None
            if shape is None or not belongs(shape, bucket):
                raise DataError(f"holds a latent of (t, h, w) = {shape}, which does not belong to {bucket}")
            for frames, name in self.tails.items():
                there, channels = tensors.get(name), len(tensors["latent"])
                fits = (channels, 1 + (frames - 1) // TIME, *shape[1:])
                if there is not None and tuple(there.shape) != fits:
                    raise DataError(f"holds a {name} of {tuple(there.shape)} where {fits} belongs to its latent")
            kept = tensors, row.fps, captions_of(header)
            self.cache.put(index, kept, sum(value.nbytes for value in tensors.values()))
        return kept

    def stack(self, samples: list[Sample], common: dict[str, Any]) -> LatentBatch:
        """Return the samples' latents, and what is stored of the captions chosen."""
        names = [text_name(sample.caption.text) for sample in samples]
        stored = [sample.payload.get(name) for sample, name in zip(samples, names, strict=True)]
        text = tuple(stored) if any(held is not None for held in stored) else ()
        latents = tuple(sample.payload["latent"] for sample in samples)
        tails = tuple(
            {frames: sample.payload[name] for frames, name in self.tails.items() if name in sample.payload}
            for sample in samples
        )
        return LatentBatch(latents=latents, text=text, tails=tails if self.tails else (), **common)


def belongs(shape: tuple[int, ...], bucket: Bucket) -> bool:
    """Return whether a latent of (t, h, w) is of a clip of this size: its VAE's stride in space is one number."""
    frames, height, width = shape
    stride = bucket.height // height
    return (1 + (frames - 1) * TIME, height * stride, width * stride) == (bucket.frames, bucket.height, bucket.width)


class MicroBatches(Dataset):
    """One rank's micro-batches, numbered from the beginning of the run.

    Args:
        plan: the order.
        source: how samples are read.
        captions: how a caption is chosen.
        rank, world_size: this process among those that share the data.
        quarantine: JSON-lines file to which unreadable samples are added; None keeps them in the log only.
        max_bad: share of the dataset that may be unreadable before the run stops; a few always may.
    """

    def __init__(
        self,
        *,
        plan: Plan,
        source: Source,
        captions: CaptionMix,
        rank: int = 0,
        world_size: int = 1,
        quarantine: str | Path | None = None,
        max_bad: float = 0.01,
    ) -> None:
        self.plan, self.source, self.captions = plan, source, captions
        self.rank, self.world_size = rank, world_size
        self.end: int | None = None  # the number after the last one that will be asked for, where that is known
        self._micros: dict[int, Micro] = {}  # of those that are read ahead
        self.quarantine = Quarantine(quarantine, source.manifest.folder, max_bad, len(source.manifest))

    def __getitem__(self, number: int) -> Batch:
        if isinstance(reader := self.source.reader, ReadAhead):
            worker = get_worker_info()
            if number not in self._micros:
                self._micros.clear()
            reader.reach(number, self._wanted, every=worker.num_workers if worker else 1, end=self.end)
        micro = self._micros.pop(number, None) or self._micro(number)
        placed = zip(micro.samples.tolist(), micro.buckets, strict=True)
        samples = [self._sample(index, micro.step, bucket) for index, bucket in placed]
        common = {
            "keys": tuple(sample.key for sample in samples),
            "captions": tuple(sample.caption.text for sample in samples),
            "styles": tuple(sample.caption.type for sample in samples),
            "sources": tuple(sample.caption.source for sample in samples),
            "fps": torch.tensor([sample.fps for sample in samples], dtype=torch.float32),
            "weights": torch.tensor(micro.weights, dtype=torch.float32),
            "draws": torch.tensor([sample.draw for sample in samples], dtype=torch.int64),
            "scale": float(self.plan.micros_per_step),
        }
        return self.source.stack(samples, common)

    def _micro(self, number: int) -> Micro:
        return self.plan.local(number, self.rank, self.world_size)

    def _wanted(self, number: int) -> list[Range]:
        """Return the ranges of the samples of a micro-batch that are not in memory."""
        micro = self._micros[number] = self._micro(number)
        buckets, manifest = self.plan.assignment.buckets, self.source.manifest
        placed = zip(micro.samples.tolist(), micro.buckets, strict=True)
        return [
            range_of(manifest.row(index)) for index, bucket in placed if not self.source.cached(index, buckets[bucket])
        ]

    def _sample(self, index: int, step: int, bucket: int) -> Sample:
        """Load a sample, or the first of its substitutes that can be read."""
        wanted = self._draw(index, step)
        for attempt in range(ATTEMPTS):
            draw = self._draw(index, step)
            try:
                payload, fps, original = self.source.load(index, self.plan.assignment.buckets[bucket], draw)
            except DataError as error:
                self.quarantine.add(self.source.manifest.row(index), step, str(error))
            else:
                key = self.source.manifest.key[index].decode()
                return Sample(payload, fps, key, self.captions.choose(key, original, draw), draw)
            index = self.plan.substitute(bucket, wanted, attempt)
        name = self.plan.assignment.buckets[bucket]
        raise DataError(
            f"no sample of bucket {name} can be read ({ATTEMPTS} tried); see {self.quarantine.path or 'the log'}"
        )

    def _draw(self, index: int, step: int) -> int:
        return draw_of(self.plan.seed, step, self.source.manifest.key[index].decode())
