"""Samples that are held out of training, each read as a batch of its own that is the same whenever it is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from soratrain.batch import Batch, draw_of
from soratrain.data.assignment import Bucket
from soratrain.data.captions import CaptionMix
from soratrain.data.dataset import Sample, Source


class HeldClips:
    """Held-out samples by number.

    Args:
        source: how they are read.
        captions: how a caption is chosen; each sample always has the same.
        clips: each one's number in the source, and its size.
    """

    def __init__(self, source: Source, captions: CaptionMix, clips: Sequence[tuple[int, Bucket]]) -> None:
        self.source, self.captions, self.clips = source, captions, clips

    def __len__(self) -> int:
        return len(self.clips)

    @property
    def buckets(self) -> list[Bucket]:
        """Each sample's size."""
        return [bucket for _, bucket in self.clips]

    def key(self, number: int) -> str:
        """Return a sample's key."""
        return self.source.manifest.key[self.clips[number][0]].decode()

    def read(self, number: int) -> Batch:
        """Return a sample as a batch, of weight 1; its draw depends on its key alone.

        Raises:
            DataError: it is damaged.
        """
        index, bucket = self.clips[number]
        key = self.key(number)
        draw = draw_of("held out", key)
        payload, fps, original = self.source.load(index, bucket, draw)
        caption = self.captions.choose(key, original, draw)
        common = {
            "keys": (key,),
            "captions": (caption.text,),
            "styles": (caption.type,),
            "sources": (caption.source,),
            "fps": torch.tensor([fps], dtype=torch.float32),
            "weights": torch.ones(1),
            "draws": torch.tensor([draw], dtype=torch.int64),
            "scale": 1.0,
        }
        return self.source.stack([Sample(payload, fps, key, caption, draw)], common)
