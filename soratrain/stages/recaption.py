"""stage=recaption: every clip of the shards described in every style (Betker et al., 2023, "DALL-E 3").

What lies in the folder afterwards, captions/folder.py says. One source shard is one unit of work, and its table is
written last, so what has a table is done; within a shard a journal says what is. The same command does the rest.
Processes share the shards; what becomes of one does not depend on who does it. Shards are never rewritten.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from soratrain.captions.clips import ClipGroups, seen
from soratrain.captions.describe import Outcome, describe
from soratrain.captions.engine import Engine
from soratrain.captions.folder import CaptionFolder, check_alone
from soratrain.captions.journal import Journal
from soratrain.data.buckets import Buckets
from soratrain.data.loader import made_by
from soratrain.data.reading import read_manifest
from soratrain.data.remote import Remote
from soratrain.distributed.ranks import Ranks, deal
from soratrain.errors import ConfigError, DataError, UserError, on_all_ranks
from soratrain.replies import REASONS
from soratrain.stages.encoding import pixels_by_shard
from soratrain.stages.pace import Pace, progress

log = logging.getLogger(__name__)

MANY = 0.05  # share of captions that are not who describes', from which that is said


class Recaption:
    """The job: `recaption()` returns its figures; called again, it goes on or finds everything done.

    Args:
        out: folder of the captions.
        shards: folder or URL of the clips.
        engine: who describes.
        buckets: how sizes are chosen; the same as for training, so that a caption is of what is encoded.
        prompts: by style, what an engine that was not trained here is asked.
        styles: kinds of caption to write; None writes all that there are prompts for, or that the captioner was
            trained on.
        attempts: how often a rejected caption is asked for again, by chance, before the original takes its place.
        seed: of their chance.
        lang: in which the engine answers.
        precision: `bf16-mixed` works under autocast, `32-true` does not.
        device: `auto` takes CUDA where there is one.
        workers: processes that decode.
        max_bad: share of clips that may be unreadable, or that a server may refuse, before the job stops, of those that
            each process describes; a few always may.
        remote: how shards in a store are read.

    Raises:
        ConfigError: a value out of range.
    """

    def __init__(
        self,
        *,
        out: str,
        shards: str,
        engine: Engine,
        buckets: Buckets,
        prompts: Mapping[str, str] | None = None,
        styles: Sequence[str] | None = None,
        attempts: int = 2,
        seed: int = 0,
        lang: str = "en",
        precision: str = "32-true",
        device: str = "auto",
        workers: int = 0,
        max_bad: float = 0.01,
        remote: Remote | None = None,
    ) -> None:
        if attempts < 0:
            raise ConfigError(f"stage.job.attempts={attempts} must be at least 0")
        if styles is not None and len(set(styles)) != max(1, len(styles)):
            raise ConfigError(f"stage.job.styles={list(styles)} must name one style or more, each once")
        self.out, self.shards, self.engine, self.buckets = Path(out), shards, engine, buckets
        self.prompts, self.styles, self.lang = dict(prompts or {}), styles, lang
        self.attempts, self.seed, self.device = attempts, seed, device
        self.workers, self.max_bad, self.remote = workers, max_bad, remote
        self.autocast = precision.startswith("bf16")

    def __call__(self) -> dict[str, float]:
        """Describe what is not described yet and return the figures of the whole folder.

        captions; rejected, answers that were none, and of each reason; originals, captions that clips kept for want of
        a better one; missing, where there was none either; unreadable clips; agreement, words shared with the captions
        of the same type that clips came with (F1); captions_per_s of this call.

        Raises:
            ConfigError: a style that the engine does not know.
            DataError: the folder holds another's captions, too many clips cannot be read, or captions are missing
                because nobody answered.
        """
        with Ranks.joined() as ranks:
            folder = self._prepare(ranks)
            ranks.together(lambda: self._begin(folder) if ranks.first else None)
            began = time.monotonic()
            try:
                made = sum(ranks.together(lambda: self._describe(folder, ranks)))
            finally:
                if ranks.first:
                    folder.list_failures()
            rate = made / (time.monotonic() - began)
            return ranks.together(lambda: self._finish(folder, rate) if ranks.first else {})[0]

    def _prepare(self, ranks: Ranks) -> CaptionFolder:
        """Read what is needed, and see once that an answer can come."""
        manifest = read_manifest(self.shards)
        cuda = self.device == "cuda" or (self.device == "auto" and torch.cuda.is_available())
        device = torch.device("cuda", ranks.local % torch.cuda.device_count()) if cuda else torch.device("cpu")
        try:
            ranks.together(lambda: self.engine.open(device, self.autocast, self.prompts))
            styles = self.engine.styles(self.styles)
            rev = ranks.together(lambda: self._meet() if ranks.first else "")[0]
        except UserError as error:
            raise on_all_ranks(error) from error.__cause__
        return CaptionFolder.of(self.out, rev, manifest, self.buckets.assign(manifest, lambda bucket: 1), styles)

    def _meet(self) -> str:
        rev = self.engine.identity()[:12]
        check_alone(self.out, rev)
        self.engine.try_out()
        return rev

    def _begin(self, folder: CaptionFolder) -> None:
        """Begin the folder, and say what is to come.

        Raises:
            DataError: it was begun for other clips.
        """
        folder.check_same()
        folder.tell({**self._told(folder), "complete": False})
        clips = int(folder.counts.sum())
        log.info("%s clips in the styles %s, by %s", f"{clips:,}", ", ".join(folder.styles), self.engine.model)
        for reason, count in folder.assignment.dropped.items():
            log.info("%s clips are not described: %s", f"{count:,}", reason)

    def _told(self, folder: CaptionFolder) -> dict[str, Any]:
        asked = {style: self.prompts[style] for style in folder.styles if self.engine.prompted}
        return {"engine": self.engine.name, "model": self.engine.model, "lang": self.lang, "prompts": asked}

    def _describe(self, folder: CaptionFolder, ranks: Ranks) -> int:
        """Describe this rank's shards that are not described yet; return how many captions were made."""
        costs = pixels_by_shard(folder.manifest, folder.assignment)
        own = deal(costs, ranks.size)[ranks.rank]
        todo = [number for number in own if not folder.table(number).is_file()]
        clips, lost, limit = folder.clips(todo), folder.lost(own), self.max_bad * folder.clips(own)
        made, before, pace = 0, sum(map(folder.begun, todo)), Pace(clips, clips, ranks.size)
        pace.skip(before, before)
        with progress(shown=ranks.first) as bar:
            name = f"recaption (rank 0 of {ranks.size})" if ranks.size > 1 else "recaption"
            task = bar.add_task(name, total=clips, completed=before)
            for number in todo:
                self._bear(lost, limit)  # those of earlier calls too
                journal = folder.journal(number)
                for outcome, count in self._describe_shard(folder, number, journal, ranks):
                    made += len(outcome.rows)
                    lost += {failure["key"]: failure for failure in outcome.failures if failure["final"]}.values()
                    self._bear(lost, limit)
                    bar.advance(task, count)
                    if (said := pace.step(count, count)) and ranks.first:
                        log.info("%s", said)
                    if self.engine.gone:
                        return made
                folder.finish(number, journal)
        return made

    def _bear(self, lost: Sequence[Mapping[str, Any]], limit: float) -> None:
        if len(lost) > max(3, limit):
            raise DataError(
                f"{len(lost)} clips of {self.shards} cannot be described, more than stage.job.max_bad={self.max_bad}"
                f" allows; {self.out / 'failures.jsonl'} lists them ({lost[-1]['reason']}); mend that and use"
                " fresh=true, or raise max_bad to go on without them"
            )

    def _describe_shard(
        self, folder: CaptionFolder, number: int, journal: Journal, ranks: Ranks
    ) -> Iterator[tuple[Outcome, int]]:
        """Yield what has become of each group of clips of a shard, once it is written down, and how many they were."""
        manifest, members = folder.manifest, folder.members(number)
        wanted: dict[int, list[str]] = {}
        for index, _ in members:
            key = manifest.row(index).key
            if styles := [style for style in folder.styles if (key, style) not in journal.settled]:
                wanted[index] = styles
        groups = [[one for one in group if one[0] in wanted] for group in self.engine.groups(members)]
        groups = [group for group in groups if group]
        decoded = ClipGroups(manifest, folder.assignment.stride, groups, self.engine.load, self.remote)
        for group, clips in zip(groups, made_by(decoded, self.workers), strict=True):
            whole = [(one, clip) for one, clip in zip(group, clips, strict=True) if clip.video is not None]
            known = [(seen(clip, one, manifest, folder.assignment), clip.captions) for one, clip in whole]
            asked = [(place, style) for place, (one, _) in enumerate(whole) for style in wanted[one[0]]]
            how: dict[str, Any] = {"attempts": self.attempts, "seed": self.seed, "lang": self.lang}
            outcome = describe(self.engine, known, asked, **how) if asked else Outcome()
            for clip in clips:
                if clip.video is None:
                    outcome.unreadable(manifest.row(clip.index).key, folder.styles, clip.failure)
            ranks.check()  # before it is written down
            journal.add(outcome)
            yield outcome, len(group)

    def _finish(self, folder: CaptionFolder, rate: float) -> dict[str, float]:
        """Mark the folder as whole and return its figures.

        Raises:
            DataError: it is not whole.
        """
        counts, failures = folder.known()
        by_style: dict[str, dict[str, Any]] = {style: {} for style in folder.styles}
        totals: Counter[str] = Counter()
        for name, value in sorted(counts.items()):
            style, _, what = name.partition("/")
            totals[what] += value
            if style:
                by_style[style][what] = value
        for found in by_style.values():
            if "compared" in found:
                found["agreement"] /= found["compared"]
        missing = folder.missing()
        figures = {"complete": not missing, "figures": by_style, "unreadable": totals["unreadable"]}
        folder.tell({**self._told(folder), **figures})
        if missing:
            passing = [failure["reason"] for failure in failures if not failure["final"]]
            why = self.engine.gone or next(iter(passing), "they were not asked for")
            raise DataError(
                f"{missing:,} captions are still to be made ({why}); {self.out / 'failures.jsonl'} lists"
                f" {len(passing):,} of them, and the same command goes on"
            )
        if totals["originals"] + totals["missing"] > MANY * max(totals["captions"], 1):
            log.warning(
                "%s captions are those that clips came with, and %s are missing: what %s said was none (%s); train it"
                " longer, or ask another",
                f"{totals['originals']:,}",
                f"{totals['missing']:,}",
                self.engine.model,
                ", ".join(f"{reason} {totals[reason]:,}" for reason in REASONS if totals[reason]),
            )
        rejected = {f"rejected_{reason}": float(totals[reason]) for reason in REASONS}
        result = {"captions": float(totals["captions"]), "rejected": sum(rejected.values()), **rejected}
        result |= {name: float(totals[name]) for name in ("originals", "missing", "unreadable")}
        if totals["compared"]:
            result["agreement"] = totals["agreement"] / totals["compared"]
        return {**result, "captions_per_s": rate}
