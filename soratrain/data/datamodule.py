"""The data of a training run: clips (`VideoData`) or cached latents (`LatentData`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from soratrain.data.buckets import Stored
from soratrain.data.dataset import ClipSource, LatentSource, Source
from soratrain.data.fitting import TIME
from soratrain.data.held_out import HeldOut
from soratrain.data.manifest import Manifest
from soratrain.data.plan import Plan
from soratrain.data.planned import PlannedData
from soratrain.data.reading import described
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError, DataError


class VideoData(PlannedData):
    """Clips and images as `VideoBatch`; see PlannedData for the arguments."""

    def source(self, manifest: Manifest, plan: Plan, cache: int) -> Source:
        """Return a reader of media members."""
        latents = [ext for ext in manifest.exts if ext == "safetensors"]
        if latents:
            raise DataError(f"{manifest.folder} holds latents, not clips; point inputs.shards at a folder of data_prep")
        if plan.batching != "bucket":
            raise ConfigError(
                f"data.batching={plan.batching}: clips are stacked, so that they must be of one size; packs are of"
                " cached latents (stage=dit)"
            )
        return ClipSource(manifest, plan.assignment.stride, cache, self.remote, self.strides)


class LatentData(PlannedData):
    """Cached latents as `LatentBatch`. Each latent's own shape is its bucket; the other arguments are PlannedData's.

    Args:
        latents: folder or URL of the latents' shards, or several.
        tails: numbers of frames: a clip's ends of so many, as stage=encode has stored them, are handed on too.
    """

    def __init__(
        self,
        *,
        latents: str | Sequence[str],
        tails: Sequence[int] = (),
        seed: int,
        max_steps: int,
        captions: str | Sequence[str] | None = None,
        mix: Sequence[float] | None = None,
        batching: str = "bucket",
        batch_size: int | None = None,
        tokens_per_batch: int | None = None,
        quadratic: float = 0.0,
        max_batch_size: int | None = None,
        accumulate_blocks: int = 1,
        canonical_ranks: int | None = None,
        gamma: float = 0.0,
        window: int = 64,
        image_fraction: float | None = None,
        caption_mix: Mapping[str, float] | None = None,
        caption_types: Mapping[str, float] | None = None,
        workers: int = 0,
        prefetch: int = 2,
        cache: int = 0,
        quarantine: str | None = None,
        max_bad: float = 0.01,
        remote: Remote | None = None,
        held_out: HeldOut | None = None,
    ) -> None:
        super().__init__(
            shards=latents,
            buckets=Stored(),
            seed=seed,
            max_steps=max_steps,
            captions=captions,
            mix=mix,
            batching=batching,
            batch_size=batch_size,
            tokens_per_batch=tokens_per_batch,
            quadratic=quadratic,
            max_batch_size=max_batch_size,
            accumulate_blocks=accumulate_blocks,
            canonical_ranks=canonical_ranks,
            gamma=gamma,
            window=window,
            image_fraction=image_fraction,
            caption_mix=caption_mix,
            caption_types=caption_types,
            workers=workers,
            prefetch=prefetch,
            cache=cache,
            quarantine=quarantine,
            max_bad=max_bad,
            remote=remote,
            held_out=held_out,
        )
        self.tails = tuple(sorted(set(tails)))

    def stored_texts(self) -> dict[str, dict[str, Any] | None]:
        """Return of each folder of latents whose text features or tokens it says to hold; None where it holds none."""
        return {folder: described(folder).get("text") for folder in self.folders}

    def stride(self) -> tuple[int, int, int] | None:
        """Return frames, rows and columns of pixels under a position of these latents; None where it cannot be read.

        A sample of one frame does not tell the first of these, which is that of all VAEs.
        """
        assignment = self.plan().assignment
        number = max(range(len(assignment.buckets)), key=lambda place: assignment.buckets[place].frames)
        bucket = assignment.buckets[number]
        try:
            tensors, *_ = self.source(self.manifest, self.plan(), 0).load(int(assignment.members[number][0]), bucket, 0)
        except DataError:
            return None  # reading it in training says why
        _, _, rows, columns = tensors["latent"].shape
        return TIME, bucket.height // rows, bucket.width // columns

    def source(self, manifest: Manifest, plan: Plan, cache: int) -> Source:
        """Return a reader of safetensors members."""
        if manifest.exts != ("safetensors",):
            raise DataError(f"{manifest.folder} holds {', '.join(manifest.exts)}, not latents; run stage=encode")
        return LatentSource(manifest, cache, self.remote, self.tails)
