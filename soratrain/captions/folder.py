"""The folder that stage=recaption fills, and what is known of it at any moment.

captions/<rev>/part-NNNNN.parquet    captions of source shard N, joined to clips by key
captions/<rev>/part-NNNNN.json       its figures, and what went wrong
captions.json                        who described, how it was asked, and the figures of all
failures.jsonl                       clips that could not be read, captions that are not there yet, each with why
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from soratrain.captions.engine import Member
from soratrain.captions.journal import Journal
from soratrain.data.assignment import Assignment
from soratrain.data.atomic import replacing
from soratrain.data.manifest import Manifest
from soratrain.errors import DataError

SCHEMA = 1  # of captions.json


def check_alone(out: Path, rev: str) -> None:
    """Refuse a folder with captions of another revision: all that lie in one folder are read.

    Raises:
        DataError: names both revisions and the mend.
    """
    others = sorted(path.name for path in (out / "captions").glob("*") if path.is_dir() and path.name != rev)
    if others:
        raise DataError(
            f"{out} holds captions of another captioner ({others[0]}, this one is {rev}); use fresh=true to describe"
            " the clips again, or run=NAME beside it"
        )


@dataclass(frozen=True)
class CaptionFolder:
    """Captions of a data set in some styles, by one revision of whoever describes.

    Attributes:
        out: the folder.
        rev: the revision.
        manifest, assignment: the clips, and the sizes at which they are encoded.
        counts: clips of each shard that have a size, and are described.
        styles: in the order of the tables.
    """

    out: Path
    rev: str
    manifest: Manifest
    assignment: Assignment
    counts: np.ndarray
    styles: Sequence[str]

    @classmethod
    def of(
        cls, out: Path, rev: str, manifest: Manifest, assignment: Assignment, styles: Sequence[str]
    ) -> CaptionFolder:
        """Return the folder of the clips that have a size."""
        counts = np.zeros(len(manifest.shards), dtype=np.int64)
        for members in assignment.members:
            counts += np.bincount(manifest.shard[members], minlength=len(counts))
        return cls(out, rev, manifest, assignment, counts, styles)

    def clips(self, shards: Sequence[int]) -> int:
        """Return how many clips of some shards are described."""
        return int(self.counts[list(shards)].sum())

    def members(self, number: int) -> list[Member]:
        """Return the clips of a shard that are described, in the manifest's order, with their sizes."""
        found: list[Member] = []
        for bucket, members in zip(self.assignment.buckets, self.assignment.members, strict=True):
            found += [(index, bucket) for index in members[self.manifest.shard[members] == number].tolist()]
        return sorted(found)

    def table(self, number: int) -> Path:
        """Return the file that says that a shard is done."""
        return self.out / "captions" / self.rev / f"part-{number:05d}.parquet"

    def journal(self, number: int) -> Journal:
        """Return what is known of a shard that has no table yet."""
        return Journal(self.table(number))

    def begun(self, number: int) -> int:
        """Return how many clips of a shard that has no table yet are done in every style."""
        styles = Counter(key for key, _ in self.journal(number).settled)
        return sum(count == len(self.styles) for count in styles.values())

    def finish(self, number: int, journal: Journal) -> None:
        """Write a shard's table, if all of its captions are settled."""
        order = {self.manifest.row(index).key: index for index, _ in self.members(number)}
        if len(journal.settled) == len(order) * len(self.styles):
            journal.finish(order, {style: place for place, style in enumerate(self.styles)}, self.rev)

    def known(self, shards: Sequence[int] | None = None) -> tuple[Counter[str], list[dict[str, Any]]]:
        """Return the figures by `STYLE/WHAT` and the failures of some shards, or of all; not only of those done."""
        counts: Counter[str] = Counter()
        failures: list[dict[str, Any]] = []
        for number in range(len(self.manifest.shards)) if shards is None else shards:
            shard, table = self.manifest.shards[number], self.table(number)
            if table.is_file():
                kept = json.loads(table.with_suffix(".json").read_text(encoding="utf-8"))
            else:
                journal = self.journal(number)
                kept = {
                    "counts": journal.counts,
                    "failures": [journal.failures[key] for key in sorted(journal.failures)],
                }
            counts.update(kept["counts"])
            failures += [{"shard": shard, **failure} for failure in kept["failures"]]
        return counts, failures

    def missing(self) -> int:
        """Return how many captions are still to be made."""
        undone = [number for number in range(len(self.counts)) if not self.table(number).is_file()]
        return len(self.styles) * self.clips(undone) - sum(len(self.journal(number).settled) for number in undone)

    def check_same(self) -> None:
        """Refuse a folder that was begun for other clips, or other styles; forget what a stopped job left behind it.

        Raises:
            DataError: names what differs and the mend.
        """
        file = self.out / "captions.json"
        before = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        now = {"clips": self.manifest.placed, "styles": list(self.styles)}
        if changed := [name for name, value in now.items() if before.get(name, value) != value]:
            raise DataError(
                f"{self.out} holds captions of other {' and '.join(changed)}; use fresh=true to describe the clips"
                " again, or run=NAME beside it"
            )
        for number in range(len(self.counts)):
            if self.table(number).is_file():
                self.journal(number).file.unlink(missing_ok=True)

    def lost(self, shards: Sequence[int]) -> list[dict[str, Any]]:
        """Return what has failed for good among the clips of some shards, one failure a clip."""
        found = {failure["key"]: failure for failure in self.known(shards)[1] if failure["final"]}
        return list(found.values())

    def list_failures(self) -> None:
        """Write `failures.jsonl`, or remove one that is no longer true."""
        failures, file = self.known()[1], self.out / "failures.jsonl"
        if not failures:
            file.unlink(missing_ok=True)
            return
        with replacing(file) as temporary:
            temporary.write_text("".join(json.dumps(failure) + "\n" for failure in failures))

    def tell(self, more: Mapping[str, Any]) -> None:
        """Write `captions.json`."""
        told = {"schema": SCHEMA, "kind": "captions", "rev": self.rev, "styles": list(self.styles)}
        told |= {"clips": self.manifest.placed, **more}
        with replacing(self.out / "captions.json") as temporary:
            temporary.write_text(json.dumps(told, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
