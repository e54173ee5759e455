"""Clips on their way into the VAE, and the stored form of the latents that come out.

A sample of a latents folder is `K.json` (size, rate and captions of the clip, and where it came from) and
`K.safetensors` with

    latent     [C, t, h, w], normalised per channel
    tailN      [C, t', h, w], the last N frames encoded standalone: latents cut out of `latent` would leak their past;
               one for each N of `tail_frames` that the clip is long enough for
    text.HASH  of each caption (`text_name`): features [L, D] of a frozen encoder, or tokens of `byte`, not padded

and a manifest row whose sizes are those of the pixels that were encoded.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import safetensors.torch
from torch import Tensor
from torch.utils.data import Dataset

from soratrain.data.ahead import Reader
from soratrain.data.assignment import Bucket
from soratrain.data.captions import captions_of
from soratrain.data.decode import load_clip
from soratrain.data.manifest import Manifest, Row
from soratrain.data.members import open_folder, read_members
from soratrain.data.remote import Remote
from soratrain.data.shards import ShardWriter
from soratrain.errors import DataError
from soratrain.stages.encoding_parts import Part

SCHEMA = 2  # of K.json and dataset.json


@dataclass(frozen=True)
class Clip:
    """A decoded clip, uint8 `[T, H, W, 3]`, with its row's number and its captions; or why it cannot be decoded."""

    index: int
    captions: list[Any]
    video: np.ndarray | None
    failure: str = ""


class Groups(Dataset):
    """Groups of clips of one bucket, each decoded as one item.

    Args:
        manifest, stride: of the clips; every how many source frames one is taken.
        groups: the size of each, and its clips.
        remote: how shards in a store are read.
        parts: of each group, what is wanted of its clips; all by default.
    """

    def __init__(
        self,
        manifest: Manifest,
        groups: Sequence[tuple[Bucket, np.ndarray]],
        stride: np.ndarray,
        remote: Remote | None = None,
        parts: Sequence[Part | None] | None = None,
    ) -> None:
        self.manifest, self.groups, self.stride, self.parts = manifest, groups, stride, parts
        self.reader = open_folder(manifest, manifest.folder, remote)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> tuple[Bucket, list[Clip]]:
        bucket, members = self.groups[number]
        part = self.parts[number] if self.parts else None
        within = None if part is None else part.pixels
        return bucket, [self._load(int(index), bucket, within) for index in members]

    def _load(self, index: int, bucket: Bucket, within: tuple[slice, slice, slice] | None) -> Clip:
        def take(media: bytes, **given: Any) -> np.ndarray:
            return load_clip(media, bucket=bucket, within=within, **given)

        return read_clip(self.reader, self.manifest.row(index), index, int(self.stride[index]), take)


def read_clip(reader: Reader, row: Row, index: int, stride: int, take: Callable[..., np.ndarray]) -> Clip:
    """Return clip `index` with the frames that `take` has out of its media member, or why there are none.

    Args:
        row: of the clip.
        stride: every how many source frames one is taken.
        take: called with the member's bytes, and `fps`, `frames` and `stride` by name.
    """
    try:
        header, media = read_members(reader, row)
        fps = Fraction(row.fps_num, max(row.fps_den, 1))
        return Clip(index, captions_of(header), take(media, fps=fps, frames=row.frames, stride=stride))
    except DataError as error:
        return Clip(index, [], None, str(error))


def store(
    writer: ShardWriter, row: Row, tensors: Mapping[str, Tensor], *, bucket: Bucket, stride: int, captions: list
) -> dict[str, Any]:
    """Write one sample and return its manifest row.

    Args:
        row: of the clip.
        tensors: what K.safetensors holds, of the types in which it is kept.
        bucket: pixels that were encoded.
        stride: every how many source frames one was taken.
        captions: from the clip's K.json.
    """
    size = {"w": bucket.width, "h": bucket.height, "frames": bucket.frames}
    header = {
        "schema": SCHEMA,
        "key": row.key,
        "video": {**size, "fps": [row.fps_num, row.fps_den * stride]},
        "source": {"shard": row.shard, "w": row.w, "h": row.h, "frames": row.frames, "stride": stride},
        "captions": captions,
    }
    media = safetensors.torch.save(dict(tensors))
    placed = writer.write(row.key, {"json": json.dumps(header, ensure_ascii=False).encode(), "safetensors": media})
    (json_offset, json_length), (media_offset, media_length) = placed.members["json"], placed.members["safetensors"]
    return {
        **size,
        "key": row.key,
        "shard": placed.shard,
        "kind": row.kind,
        "ext": "safetensors",
        "fps_num": row.fps_num,
        "fps_den": row.fps_den * stride,
        "json_offset": json_offset,
        "json_length": json_length,
        "media_offset": media_offset,
        "media_length": media_length,
        "crc32": zlib.crc32(media),
        "scores": "{}",
    }
