"""A shard's clips on their way to an engine: decoded in groups, each with the captions that it came with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from torch.utils.data import Dataset

from soratrain.captions.engine import Load, Member, Seen
from soratrain.data.assignment import Assignment
from soratrain.data.manifest import Manifest
from soratrain.data.members import open_folder
from soratrain.data.remote import Remote
from soratrain.stages.latents import Clip, read_clip


class ClipGroups(Dataset):
    """Groups of clips, each decoded as one item; a clip that cannot be decoded says why.

    Args:
        manifest, stride: of all clips.
        groups: of clips, of any sizes.
        load: how frames are taken.
        remote: how shards in a store are read.
    """

    def __init__(
        self,
        manifest: Manifest,
        stride: np.ndarray,
        groups: Sequence[Sequence[Member]],
        load: Load,
        remote: Remote | None = None,
    ) -> None:
        self.manifest, self.stride, self.groups, self.take = manifest, stride, groups, load
        self.reader = open_folder(manifest, manifest.folder, remote)

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> list[Clip]:
        return [self._load(index, partial(self.take, bucket=bucket)) for index, bucket in self.groups[number]]

    def _load(self, index: int, take: Callable[..., np.ndarray]) -> Clip:
        return read_clip(self.reader, self.manifest.row(index), index, int(self.stride[index]), take)


def seen(clip: Clip, member: Member, manifest: Manifest, assignment: Assignment) -> Seen:
    """Return a decoded clip as engines see it."""
    assert clip.video is not None
    index, bucket = member
    row = manifest.row(index)
    return Seen(row.key, clip.video, row.fps / int(assignment.stride[index]), bucket.frames)
