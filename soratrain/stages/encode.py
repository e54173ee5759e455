"""stage=encode: every clip of the shards through the VAE once, into shards of latents.

One source shard is one unit of work: its manifest part is written last, so what has a part is done, and the same
command goes on with the others. Processes share the units; what a unit becomes does not depend on who does it. Where
processes work in groups, a group shares each unit: every long clip of it, and the batches of short ones.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.loader import made_by
from soratrain.data.manifest import Manifest
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.distributed.mesh import Mesh, check_ranks
from soratrain.distributed.ranks import LONGEST, Ranks, deal
from soratrain.distributed.sequence import group_of
from soratrain.errors import DataError
from soratrain.models.autoencoders import load_vae
from soratrain.models.vae import VAE
from soratrain.stages.encode_output import CUT, Output, texts_cut
from soratrain.stages.encoding import ClipEncoder, pixels, pixels_by_shard, trimmed
from soratrain.stages.encoding_parts import Part
from soratrain.stages.encoding_rounds import Encoded, rounds
from soratrain.stages.latents import SCHEMA, Clip, Groups
from soratrain.stages.pace import Pace, progress
from soratrain.stages.texts import Texts
from soratrain.stages.vae_latents import encoder_hash

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Work:
    """All that a rank needs to encode its shards.

    Attributes:
        mesh, team: the groups of ranks, and this rank among those of its own.
    """

    manifest: Manifest
    assignment: Assignment
    vae: VAE
    device: torch.device
    texts: Texts | None
    mesh: Mesh
    team: Ranks


class Encode:
    """The job: `encode()` returns its figures; called again, it goes on or finds everything done.

    Args:
        out: folder of the latents.
        shards: folder or URL of the clips.
        vae: the VAE's weights: a stage's folder, one that diffusers wrote, or an id on the hub.
        buckets: how sizes are chosen.
        text: factory of the text encoder whose tokens or features of the captions are stored too; None, or one with
            `features=live`, stores none.
        captions: folder of captions made later, whose texts are stored beside those of the shards' own; or None.
        tail_frames, dtype, pixels_per_batch: see `ClipEncoder`.
        precision: `bf16-mixed` encodes under autocast, `32-true` does not.
        device: `auto` takes CUDA where there is one.
        workers: processes that decode.
        max_bad: share of clips that may be unreadable before the job stops; a few always may.
        max_bytes: size of an output shard.
        remote: how shards in a store are read.
        sequence: processes that encode each long clip together.

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
        text: partial | None = None,
        captions: str | None = None,
        tail_frames: Sequence[int] = (1, 5),
        dtype: str = "bf16",
        pixels_per_batch: int = 1 << 22,
        precision: str = "32-true",
        device: str = "auto",
        workers: int = 0,
        max_bad: float = 0.01,
        max_bytes: int = 256 << 20,
        remote: Remote | None = None,
        sequence: int = 1,
    ) -> None:
        self.encoding = ClipEncoder(
            tail_frames=tail_frames,
            dtype=dtype,
            pixels_per_batch=pixels_per_batch,
            autocast=precision.startswith("bf16"),
        )
        self.out, self.shards, self.vae_folder, self.buckets = Path(out), shards, vae, buckets
        self.text, self.captions, self.device = text, captions, device
        self.workers, self.max_bad, self.max_bytes, self.remote = workers, max_bad, max_bytes, remote
        self.sequence = sequence

    def __call__(self) -> dict[str, float]:
        """Encode what is not encoded yet; return clips, clips a second of this call, megabytes, and what was left out.

        Also how many captions of all of them are longer than the text encoder reads, and were cut.

        Raises:
            DataError: the folder holds latents of something else, or too many clips cannot be read.
        """
        with Ranks.joined() as ranks:
            mesh = Mesh(ranks.rank, ranks.size, self.sequence)
            check_ranks(mesh.sequence, mesh.size, "the processes of this job")
            # before anything fails on one rank alone: the others would wait for it here
            team = ranks.team(mesh, group_of(mesh, LONGEST, "gloo") if mesh.sequence > 1 else None)
            work = self._prepare(ranks, mesh, team)
            ranks.together(lambda: self._claim(work) if ranks.first else None)
            began = time.monotonic()
            parts = ranks.together(lambda: self._encode(work, ranks))
            rate = sum(parts) / (time.monotonic() - began)
            return ranks.together(lambda: self._finish(work, rate) if ranks.first else {})[0]

    def _prepare(self, ranks: Ranks, mesh: Mesh, team: Ranks) -> Work:
        """Read what is needed, and see that the buckets fit the VAE."""
        manifest = read_manifest(self.shards)
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        device = torch.device("cuda", ranks.local % torch.cuda.device_count()) if cuda else torch.device("cpu")
        vae = load_vae(self.vae_folder, device)
        assignment = self.buckets.assign(manifest, lambda bucket: 1)
        for bucket in assignment.buckets:
            vae.check_size(bucket.frames, bucket.height, bucket.width)
        return Work(manifest, assignment, vae, device, Texts.of(self.text, self.captions, device), mesh, team)

    def fingerprint(self, work: Work) -> dict[str, str]:
        """Return what the latents depend on: the VAE's encoder, the clips, what is taken of them how, and the texts."""
        assignment = work.assignment
        taken = hashlib.sha256(f"{self.encoding}".encode() + assignment.stride.tobytes())
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
            taken.update(f"{bucket}".encode() + members.tobytes())
        return {
            "vae": encoder_hash(work.vae),
            "shards": work.manifest.hash,
            "transform": taken.hexdigest(),
            "text": "none" if work.texts is None else work.texts.identity(),
        }

    def _part(self, number: int) -> Path:
        return self.out / "manifest" / f"part-{number:05d}.parquet"

    def _dataset(self) -> dict[str, Any]:
        file = self.out / "dataset.json"
        return json.loads(file.read_text()) if file.is_file() else {}

    def _write(self, value: dict[str, Any]) -> None:
        with replacing(self.out / "dataset.json") as temporary:
            temporary.write_text(json.dumps(value, indent=1) + "\n")

    def _claim(self, work: Work) -> None:
        """Begin the folder, or make sure that what it holds was made from the same; then say what is to come."""
        fingerprint = self.fingerprint(work)
        found = self._dataset().get("fingerprint", fingerprint)
        if changed := [name for name in fingerprint if found.get(name) != fingerprint[name]]:
            raise DataError(
                f"{self.out} holds latents made with another {' and '.join(changed)}; use fresh=true to encode"
                " again, or run=NAME beside it"
            )
        text = None if work.texts is None else work.texts.encoder.record()
        begun = {"schema": SCHEMA, "kind": "latents", "fingerprint": fingerprint, "text": text, "complete": False}
        self._write(begun | self._dataset())
        frozen = text is not None and text.get("kind") != "byte"
        log.info("%s", self.encoding.foretold(work.vae, work.manifest, work.assignment, features=frozen))
        for reason, count in work.assignment.dropped.items():
            log.info("%s clips are not encoded: %s", f"{count:,}", reason)

    def _encode(self, work: Work, ranks: Ranks) -> int:
        """Encode its group's shards that are not encoded yet; return how many clips they held, once for a group."""
        costs, mesh = pixels_by_shard(work.manifest, work.assignment), work.mesh
        own = deal(costs, mesh.data_ranks)[mesh.data_rank]
        todo = work.team.together(lambda: [number for number in own if not self._part(number).is_file()])[0]
        clips = sum(int(np.isin(work.manifest.shard[members], todo).sum()) for members in work.assignment.members)
        done, failed, pace = 0, 0, Pace(clips, sum(costs[number] for number in todo), mesh.data_ranks)
        with progress(shown=ranks.first) as bar:
            task = bar.add_task(f"encode (rank 0 of {ranks.size})" if ranks.size > 1 else "encode", total=clips)
            for number in todo:
                for bucket, encoded, unreadable in self._encode_shard(work, number):
                    done, failed = done + encoded, failed + unreadable
                    bar.advance(task, encoded + unreadable)
                    self._bear(failed, len(work.manifest))
                    if (said := pace.step(encoded * pixels(bucket), encoded + unreadable)) and ranks.first:
                        log.info("%s", said)
        return done if mesh.counts else 0

    def _bear(self, failed: int, clips: int) -> None:
        if failed > max(3, self.max_bad * clips):
            raise DataError(
                f"{failed} clips of {self.shards} cannot be read, more than max_bad={self.max_bad} allows; see the log"
            )

    def _encode_shard(self, work: Work, number: int) -> Iterator[tuple[Bucket, int, int]]:
        """Encode a source shard into shards of its own; yield each batch's bucket, clips done, and clips unreadable."""
        manifest, strides, team = work.manifest, work.assignment.stride, work.team
        batches = self.encoding.batches(work.vae, manifest, work.assignment, number, team.size)
        plan = list(rounds(batches, team.size))
        own = [each.of(team.rank) for each in plan]
        wanted, parts = [item[0] for item in own if item], [item[1] for item in own if item]
        groups = Groups(manifest, wanted, strides, self.remote, parts)
        loaded = made_by(groups, self.workers)
        how: dict[str, Any] = {"max_bytes": self.max_bytes, "manifest": manifest, "strides": strides}
        with Output(self.out, number, active=team.first, **how) as output:
            team.together(output.open)
            for each, item in zip(plan, own, strict=True):
                made = team.together(partial(self._made, work, loaded, item[1]) if item else lambda: None)
                whole = list(each.whole(made))
                team.together(partial(output.add, whole))
                for bucket, clips in whole:
                    unreadable = sum(bool(clip.failure) for clip in clips)
                    yield bucket, len(clips) - unreadable, unreadable
            team.together(output.close)

    def _made(self, work: Work, loaded: Iterator[tuple[Bucket, list[Clip]]], part: Part | None) -> list[Encoded] | None:
        """Return what this rank makes of the next clips, or of its part of them; the texts are the first one's part."""
        work.team.check()
        _, clips = next(loaded)
        whole = [clip for clip in clips if clip.video is not None]
        videos = [clip.video for clip in whole if clip.video is not None]
        latents = self.encoding(work.vae, videos, work.device, part)
        texts: Sequence[tuple[dict[str, Tensor], int]] = [({}, 0) for _ in whole]
        if work.texts is not None and (part is None or work.team.first):
            keys = [work.manifest.row(clip.index).key for clip in whole]
            texts = work.texts(keys, [clip.captions for clip in whole])
        made = {
            clip.index: Encoded(clip.index, clip.captions, latent, text, cut=cut)
            for clip, latent, (text, cut) in zip(whole, latents, texts, strict=True)
        }
        return [made.get(clip.index) or Encoded(clip.index, [], failure=clip.failure) for clip in clips]

    def _finish(self, work: Work, rate: float) -> dict[str, float]:
        """Mark the folder as whole and return its figures."""
        rows, manifest = read_manifest(self.out), work.manifest
        size = sum((self.out / name).stat().st_size for name in rows.shards)
        self._bear(sum(map(len, work.assignment.members)) - len(rows), len(manifest))
        totals = {
            "clips": len(rows),
            "not_encoded": len(manifest) - len(rows),
            "frames_trimmed": trimmed(manifest, work.assignment),
        }
        if work.texts is not None:
            totals[CUT] = texts_cut(self.out)
            if totals[CUT]:
                log.warning("%s captions are longer than text.max_tokens and were cut", f"{totals[CUT]:,}")
        self._write({**self._dataset(), "totals": {**totals, "bytes": size}, "complete": True})
        return {**totals, "clips_per_s": rate, "megabytes": size / 1e6}
