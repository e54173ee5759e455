"""stage=encode: every clip of the shards through the VAE once, into shards of latents.

One source shard is one unit of work: its manifest part is written last, so what has a part is done, and the same
command goes on with the others.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.data import DataLoader

from soratrain.batch import to_pixels
from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.manifest import Manifest, write_manifest
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardWriter
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.autoencoders import load_vae
from soratrain.models.vae import VAE
from soratrain.stages.latents import SCHEMA, Groups, store

log = logging.getLogger(__name__)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Encode:
    """The job: `encode()` returns its figures; called again, it goes on or finds everything done.

    Args:
        out: folder of the latents.
        shards: folder or URL of the clips.
        vae: folder of the VAE's weights.
        buckets: how sizes are chosen.
        tail_frames: frames of `tail`, 1 + 4k; shorter clips give as many as they have.
        dtype: of the stored latents, `bf16` or `fp16`.
        pixels_per_batch: pixels (frames × height × width) encoded at once; a longer clip is encoded in pieces.
        precision: `bf16-mixed` encodes under autocast, `32-true` does not.
        device: `auto` takes CUDA where there is one.
        workers: processes that decode.
        max_bad: share of clips that may be unreadable before the job stops; a few always may.
        max_bytes: size of an output shard.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        shards: str,
        vae: str,
        buckets: Buckets,
        tail_frames: int = 5,
        dtype: str = "bf16",
        pixels_per_batch: int = 1 << 22,
        precision: str = "32-true",
        device: str = "auto",
        workers: int = 0,
        max_bad: float = 0.01,
        max_bytes: int = 256 << 20,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"stage.job.dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
        if tail_frames < 1 or tail_frames % 4 != 1:
            raise ConfigError(f"stage.job.tail_frames={tail_frames} is not 1 + 4k; use 1, 5 or 9")
        if pixels_per_batch < 1:
            raise ConfigError(f"stage.job.pixels_per_batch={pixels_per_batch} must be at least 1")
        self.out, self.shards, self.vae_folder, self.buckets = Path(out), shards, vae, buckets
        self.tail_frames, self.dtype, self.pixels_per_batch = tail_frames, dtype, pixels_per_batch
        self.workers, self.max_bad, self.max_bytes = workers, max_bad, max_bytes
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.autocast = precision.startswith("bf16")

    def __call__(self) -> dict[str, float]:
        """Encode what is not encoded yet; return clips, clips a second of this call, megabytes, and what was left out.

        Raises:
            DataError: the folder holds latents of something else, or too many clips cannot be read.
        """
        manifest = read_manifest(self.shards)
        module = load_vae(self.vae_folder, self.device)
        assignment = self.buckets.assign(manifest, lambda bucket: 1)
        for bucket in assignment.buckets:
            module.check_size(bucket.frames, bucket.height, bucket.width)
        self._claim(self.fingerprint(module, manifest, assignment))
        began, done, failed = time.monotonic(), 0, 0
        with progress() as bar:
            task = bar.add_task("encode", total=sum(map(len, assignment.members)))
            for number in range(len(manifest.shards)):
                if self._part(number).is_file():
                    bar.advance(task, int((manifest.shard == number).sum()))
                    continue
                for encoded in self._encode_shard(module, manifest, assignment, number):
                    done, failed = done + encoded, failed + (not encoded)
                    bar.advance(task)
                    if failed > max(3, self.max_bad * len(manifest)):
                        raise DataError(
                            f"{failed} clips of {self.shards} cannot be read, more than max_bad={self.max_bad} allows;"
                            " see the log"
                        )
        seconds = time.monotonic() - began
        rows = read_manifest(self.out)
        size = sum((self.out / name).stat().st_size for name in rows.shards)
        totals = {
            "clips": len(rows),
            "not_encoded": len(manifest) - len(rows),
            "frames_trimmed": trimmed(manifest, assignment),
        }
        self._write({**self._dataset(), "totals": {**totals, "bytes": size}, "complete": True})
        return {**totals, "clips_per_s": done / seconds, "megabytes": size / 1e6}

    def fingerprint(self, vae: VAE, manifest: Manifest, assignment: Assignment) -> dict[str, str]:
        """Return what the latents depend on: the VAE's weights, the clips, and what is taken of them how."""
        taken = hashlib.sha256(assignment.stride.tobytes())
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
            taken.update(f"{bucket}:{self.tail_frames}:{self.dtype}".encode() + members.tobytes())
        return {"vae": weights.digest(vae), "shards": manifest.hash, "transform": taken.hexdigest()}

    def _part(self, number: int) -> Path:
        return self.out / "manifest" / f"part-{number:05d}.parquet"

    def _dataset(self) -> dict[str, Any]:
        file = self.out / "dataset.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _write(self, value: dict[str, Any]) -> None:
        with replacing(self.out / "dataset.json") as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n")

    def _claim(self, fingerprint: dict[str, str]) -> None:
        """Begin the folder, or make sure that what it holds was made from the same."""
        found = self._dataset().get("fingerprint", fingerprint)
        if changed := [name for name in fingerprint if found.get(name) != fingerprint[name]]:
            raise DataError(
                f"{self.out} holds latents made with another {' and '.join(changed)}; use fresh=true to encode"
                " again, or run=NAME beside it"
            )
        self._write(
            {"schema": SCHEMA, "kind": "latents", "fingerprint": fingerprint, "complete": False} | self._dataset()
        )

    def _encode_shard(self, vae: VAE, manifest: Manifest, assignment: Assignment, number: int) -> Iterator[bool]:
        """Encode one source shard into shards of its own, yielding after each clip whether it could be read."""
        groups: list[tuple[Bucket, np.ndarray]] = []
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
            mine = members[manifest.shard[members] == number]
            size = max(1, self.pixels_per_batch // (bucket.frames * bucket.height * bucket.width))
            groups += [(bucket, mine[start : start + size]) for start in range(0, len(mine), size)]
        loader = DataLoader(Groups(manifest, groups, assignment.stride), batch_size=None, num_workers=self.workers)
        for unfinished in self.out.glob(f".latents-{number:05d}-*"):
            unfinished.unlink()
        rows = []
        with ShardWriter(self.out, self.max_bytes, prefix=f"latents-{number:05d}") as writer:
            for bucket, clips in loader:
                for clip in clips:
                    if clip.video is None:
                        log.warning("clip %s is not encoded: %s", manifest.row(clip.index).key, clip.failure)
                        yield False
                whole = [clip for clip in clips if clip.video is not None]
                for clip, tensors in zip(whole, self._encode(vae, [clip.video for clip in whole]), strict=True):
                    row, stride = manifest.row(clip.index), int(assignment.stride[clip.index])
                    rows.append(store(writer, row, tensors, bucket=bucket, stride=stride, captions=clip.captions))
                    yield True
        write_manifest(self.out, rows, part=number)

    @torch.no_grad()
    def _encode(self, vae: VAE, videos: Sequence[np.ndarray]) -> list[dict[str, Tensor]]:
        """Return `latent` and `tail` of clips of one size, stored type, on the CPU."""
        if not videos:
            return []
        stacked = torch.from_numpy(np.stack(videos))
        tail = stacked[:, -min(self.tail_frames, stacked.shape[1]) :]
        dtype = DTYPES[self.dtype]
        step = max(4, self.pixels_per_batch // (stacked.shape[2] * stacked.shape[3]) // 4 * 4)

        def encode(video: Tensor) -> Tensor:
            pieces = (to_pixels(piece.to(self.device)) for piece in video.split(step, dim=1))
            if video.shape[1] <= step + 1:  # small enough for one piece
                return vae.encode(to_pixels(video.to(self.device))).to("cpu", dtype)
            return torch.cat([piece.to("cpu", dtype) for piece in vae.encode_stream(pieces, step)], dim=2)

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            pairs = zip(encode(stacked), encode(tail), strict=True)
        return [{"latent": latent.contiguous(), "tail": end.contiguous()} for latent, end in pairs]


def trimmed(manifest: Manifest, assignment: Assignment) -> int:
    """Return how many source frames, of those at the chosen rate, no latent covers."""
    return sum(
        int((1 + (manifest.frames[members] - 1) // assignment.stride[members] - bucket.frames).sum())
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True)
    )


def progress() -> Progress:
    """Return a progress bar with time left and clips a second."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )
