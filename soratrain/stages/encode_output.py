"""The latents of one source shard on their way to disk."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pyarrow.parquet as pq

from soratrain.data.assignment import Bucket
from soratrain.data.manifest import Manifest, write_manifest
from soratrain.data.shards import ShardWriter
from soratrain.stages.encoding_rounds import Encoded
from soratrain.stages.latents import store

log = logging.getLogger(__name__)
CUT = "texts_cut"  # what a manifest's part says of captions longer than their encoder reads


def texts_cut(out: Path) -> int:
    """Return how many captions of all shards in `out` are longer than their encoder reads."""
    told = [pq.read_schema(part).metadata or {} for part in out.glob("manifest/part-*.parquet")]
    return sum(int(each.get(CUT.encode(), 0)) for each in told)


class Output:
    """Writes what a group of processes makes of a source shard; `active` on one of them, and nothing on the others.

        with Output(...) as output:   # an exception inside removes the unfinished shard
            output.open()
            output.add(batches)
            output.close()            # now, and only now, it counts as done

    Args:
        out: folder of the latents.
        number: of the source shard.
        max_bytes: size of an output shard.
        manifest, strides: of the clips; every how many source frames one was taken.
        active: whether this process writes.
    """

    def __init__(
        self, out: Path, number: int, *, max_bytes: int, manifest: Manifest, strides: np.ndarray, active: bool
    ) -> None:
        self.out, self.number, self.max_bytes = out, number, max_bytes
        self.manifest, self.strides, self.active = manifest, strides, active
        self.writer: ShardWriter | None = None
        self.rows: list[dict[str, Any]] = []
        self.cut = 0  # captions longer than their encoder reads

    def open(self) -> None:
        """Remove what a run that was stopped has left, and begin."""
        if not self.active:
            return
        name = f"latents-{self.number:05d}"
        for unfinished in self.out.glob(f".{name}-*"):
            unfinished.unlink()
        self.writer = ShardWriter(self.out, self.max_bytes, prefix=name)

    def add(self, batches: Iterable[tuple[Bucket, list[Encoded]]]) -> None:
        """Write clips, and say which of them cannot be read."""
        for bucket, clips in batches if self.writer else ():
            assert self.writer is not None
            for clip in clips:
                row, stride = self.manifest.row(clip.index), int(self.strides[clip.index])
                if clip.failure:
                    log.warning("clip %s is not encoded: %s", row.key, clip.failure)
                    continue
                self.cut += clip.cut
                tensors = {**clip.latents, **clip.texts}
                self.rows.append(store(self.writer, row, tensors, bucket=bucket, stride=stride, captions=clip.captions))

    def close(self) -> None:
        """Finish the shards, then the manifest's part, which says that they are whole."""
        if self.writer is not None:
            self.writer.close()
            write_manifest(self.out, self.rows, part=self.number, told={CUT: str(self.cut)})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None) -> None:
        if self.writer is not None:
            self.writer.abort()
