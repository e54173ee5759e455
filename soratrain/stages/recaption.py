"""stage=recaption: the trained captioner describes every clip of the shards (Betker et al., 2023, "DALL-E 3").

    captions/<rev>/part-NNNNN.parquet    captions of source shard N, joined to clips by key
    captions/<rev>/part-NNNNN.json       its figures

`rev` is a hash of the captioner's weights. One source shard is one unit of work, and its table is written last, so what
has a table is done, and the same command goes on with the others. Shards are never rewritten.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from soratrain.batch import draw_of, to_pixels
from soratrain.data.assignment import Assignment, Bucket
from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.manifest import Manifest, write_captions
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.caption_model import CaptionModel
from soratrain.stages.latents import Clip, Groups
from soratrain.stages.pace import progress

log = logging.getLogger(__name__)
# Four or more characters said three times in a row, or one said eight times: a decoder that has lost its way.
REPEATED = re.compile(r"(.{4,}?)\1\1|(\S)\2{7}", re.DOTALL)
ORIGINAL = "original"  # in the column `model`: the caption that the clip came with, for want of a better one


def fault(caption: str) -> str | None:
    """Return why a caption is no description, or None: `empty` (also one that never ended) or `repeated`."""
    if not caption.strip():
        return "empty"
    return "repeated" if REPEATED.search(caption) else None


def overlap(one: str, other: str) -> float:
    """Return the F1 score of the words that two captions share, 0 to 1."""
    first, second = (Counter(re.findall(r"\w+", text.lower())) for text in (one, other))
    return 2 * (first & second).total() / max(first.total() + second.total(), 1)


def original(captions: Sequence[dict[str, Any]], style: str) -> str:
    """Return the caption that a clip came with: of this style, else of its own words (`gt`), else any; or nothing."""
    for kinds in ({style}, {"gt"}, {caption.get("type") for caption in captions}):
        for caption in captions:
            if caption.get("type") in kinds and str(caption.get("text", "")).strip():
                return str(caption["text"])
    return ""


class Recaption:
    """The job: `recaption()` returns its figures; called again, it goes on or finds everything done.

    Args:
        out: folder of the captions.
        shards: folder or URL of the clips.
        captioner: folder of the captioner's weights.
        buckets: how sizes are chosen; the same as for training, so that a caption is of what is encoded.
        styles: kinds of caption to write; None writes all that the captioner was trained on.
        batch_size: clips described at once, at most.
        pixels_per_batch: pixels (frames x height x width) described at once, at most.
        attempts: how often a rejected caption is asked for again, by chance, before the original takes its place.
        top_p: nucleus of those attempts.
        seed: of their chance.
        precision: `bf16-mixed` works under autocast, `32-true` does not.
        device: `auto` takes CUDA where there is one.
        workers: processes that decode.
        max_bad: share of clips that may be unreadable before the job stops; a few always may.
        remote: how shards in a store are read.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        shards: str,
        captioner: str,
        buckets: Buckets,
        styles: Sequence[str] | None = None,
        batch_size: int = 128,
        pixels_per_batch: int = 1 << 24,
        attempts: int = 2,
        top_p: float = 0.9,
        seed: int = 0,
        precision: str = "32-true",
        device: str = "auto",
        workers: int = 0,
        max_bad: float = 0.01,
        remote: Remote | None = None,
    ) -> None:
        for name, value, least in (("batch_size", batch_size, 1), ("pixels_per_batch", pixels_per_batch, 1)):
            if value < least:
                raise ConfigError(f"stage.job.{name}={value} must be at least {least}")
        if attempts and not 0 < top_p <= 1:
            raise ConfigError(f"stage.job.top_p={top_p} must lie in (0, 1]")
        self.out, self.shards, self.captioner, self.buckets = Path(out), shards, captioner, buckets
        self.styles = styles
        self.batch_size, self.pixels_per_batch = batch_size, pixels_per_batch
        self.attempts, self.top_p, self.seed = attempts, top_p, seed
        self.workers, self.max_bad, self.remote = workers, max_bad, remote
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.autocast = precision.startswith("bf16")

    def __call__(self) -> dict[str, float]:
        """Describe what is not described yet and return the figures of the whole folder.

        captions; rejected, answers that were none; originals, captions that clips kept for want of a better one;
        missing, where there was none either; unreadable clips; agreement, words shared with the captions of the same
        type that clips came with (F1); captions_per_s of this call.

        Raises:
            ConfigError: a style that the captioner was not trained on.
            DataError: the folder holds another captioner's captions, or too many clips cannot be read.
        """
        manifest = read_manifest(self.shards)
        net, _ = weights.load(self.captioner, "captioner", self.device)
        assert isinstance(net, CaptionModel)
        styles = self._styles(net)
        rev = hashlib.sha256()
        for file in weights.files(self.captioner, "captioner"):
            rev.update(file.read_bytes())
        folder = self._claim(rev.hexdigest()[:12])
        assignment = self.buckets.assign(manifest, lambda bucket: 1)
        began, made = time.monotonic(), 0
        with progress() as bar:
            task = bar.add_task("recaption", total=sum(map(len, assignment.members)))
            for number in range(len(manifest.shards)):
                table = folder / f"part-{number:05d}.parquet"
                if table.is_file():
                    bar.advance(task, int((manifest.shard == number).sum()))
                    continue
                figures: Counter[str] = Counter()
                rows: list[dict[str, str]] = []
                for described in self._describe_shard(net, styles, manifest, assignment, number, figures):
                    rows += described
                    bar.advance(task)
                with replacing(table.with_suffix(".json")) as temporary:
                    temporary.write_text(json.dumps(figures, indent=1) + "\n")
                write_captions(table, [{**row, "rev": folder.name} for row in rows])
                made += len(rows)
        total: Counter[str] = Counter()
        for path in sorted(folder.glob("part-*.json")):
            total.update(json.loads(path.read_text()))
        result = {name: float(total[name]) for name in ("captions", "rejected", "originals", "missing", "unreadable")}
        if total["compared"]:
            result["agreement"] = total["agreement"] / total["compared"]
        return {**result, "captions_per_s": made / (time.monotonic() - began)}

    def _styles(self, net: CaptionModel) -> list[str]:
        """Return the styles to write."""
        known, wanted = net.known_styles, net.known_styles if self.styles is None else self.styles
        if not known or not set(wanted) <= set(known):
            raise ConfigError(
                f"inputs.captioner={self.captioner} was trained on the styles {list(known)}, not on"
                f" {sorted(set(wanted) - set(known))}; train it on captions of these types, or set stage.job.styles"
            )
        return list(wanted)

    def _claim(self, rev: str) -> Path:
        """Return the folder of this revision; another captioner's captions beside it would be read as well."""
        others = sorted(path.name for path in (self.out / "captions").glob("*") if path.name != rev)
        if others:
            raise DataError(
                f"{self.out} holds captions of another captioner ({others[0]}, this one is {rev}); use fresh=true to"
                " describe the clips again, or run=NAME beside it"
            )
        return self.out / "captions" / rev

    def _describe_shard(
        self,
        net: CaptionModel,
        styles: Sequence[str],
        manifest: Manifest,
        assignment: Assignment,
        number: int,
        figures: Counter[str],
    ) -> Iterator[list[dict[str, str]]]:
        """Yield the table rows of each clip of one shard, without `rev`, and count into `figures`."""
        groups: list[tuple[Bucket, np.ndarray]] = []
        for bucket, members in zip(assignment.buckets, assignment.members, strict=True):
            mine = members[manifest.shard[members] == number]
            fitting = self.pixels_per_batch // (bucket.frames * bucket.height * bucket.width)
            size = max(1, min(self.batch_size, fitting))
            groups += [(bucket, mine[start : start + size]) for start in range(0, len(mine), size)]
        clips = Groups(manifest, groups, assignment.stride, self.remote)
        loader = DataLoader(clips, batch_size=None, num_workers=self.workers)
        for _, clips in loader:
            for clip in clips:
                if clip.video is None:
                    figures["unreadable"] += 1
                    log.warning("clip %s is not described: %s", manifest.row(clip.index).key, clip.failure)
                    if figures["unreadable"] > max(3, self.max_bad * len(manifest)):
                        raise DataError(
                            f"{figures['unreadable']} clips of one shard of {self.shards} cannot be read, more than"
                            f" max_bad={self.max_bad} of all; see the log"
                        )
            whole = [clip for clip in clips if clip.video is not None]
            if whole:
                rates = [manifest.row(clip.index).fps / int(assignment.stride[clip.index]) for clip in whole]
                keys = [manifest.row(clip.index).key for clip in whole]
                yield from self._describe(net, styles, whole, keys, rates, figures)

    @torch.no_grad()
    def _describe(
        self,
        net: CaptionModel,
        styles: Sequence[str],
        clips: Sequence[Clip],
        keys: Sequence[str],
        rates: Sequence[float],
        figures: Counter[str],
    ) -> Iterator[list[dict[str, str]]]:
        """Yield the rows of each of `clips`, all of one size; what is rejected is asked for again, then replaced."""
        pixels = to_pixels(
            torch.from_numpy(np.stack([clip.video for clip in clips if clip.video is not None])).to(self.device)
        )
        fps = torch.tensor(rates, device=self.device)
        rows: dict[str, list[dict[str, str]]] = {key: [] for key in keys}
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            looked = net.look(pixels, fps)[0]
            texts = {style: net.say(looked, style) for style in styles}
            for style, captions in texts.items():
                for attempt in range(self.attempts):
                    again = [place for place, caption in enumerate(captions) if fault(caption)]
                    figures["rejected"] += len(again)
                    if not again:
                        break
                    draws = [draw_of(self.seed, keys[place], style, attempt) for place in again]
                    asked = net.say(looked[again], style, top_p=self.top_p, draws=draws)
                    for place, caption in zip(again, asked, strict=True):
                        captions[place] = caption
        for style, captions in texts.items():
            for clip, key, caption in zip(clips, keys, captions, strict=True):
                given, model = original(clip.captions, style), "captioner"
                if fault(caption):
                    caption, model = given, ORIGINAL
                    figures["originals" if given else "missing"] += 1
                elif any(own.get("type") == style for own in clip.captions):
                    figures["compared"] += 1
                    figures["agreement"] += overlap(caption, given)  # type: ignore[assignment]
                if caption:
                    figures["captions"] += 1
                    rows[key].append({"key": key, "type": style, "text": caption, "model": model, "lang": "en"})
        yield from rows.values()
