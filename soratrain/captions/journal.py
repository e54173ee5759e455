"""What has been said about a shard's clips so far, a line a group: a job that is stopped loses one group at most.

When all of a shard is settled, its table is written, in the clips' order, and the journal goes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from soratrain.captions.describe import Outcome
from soratrain.data.atomic import replacing
from soratrain.data.manifest import write_captions


class Journal:
    """The outcomes of one shard.

    Args:
        table: the shard's table of captions, beside which the journal lies.
    """

    def __init__(self, table: Path) -> None:
        self.table, self.file = table, table.with_name(f".{table.stem}.jsonl")
        self.rows: dict[tuple[str, str], dict[str, str]] = {}
        self.settled: set[tuple[str, str]] = set()
        self.failures: dict[tuple[str, str], dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        for line in lines(self.file):
            self._take(line)

    def _take(self, line: Mapping[str, Any]) -> None:
        self.rows |= {(row["key"], row["type"]): row for row in line["rows"]}
        self.counts.update(line["counts"])
        for key, style in line["settled"]:
            self.settled.add((key, style))
            self.failures.pop((key, style), None)
        self.failures |= {(failure["key"], failure["style"]): failure for failure in line["failures"]}

    def add(self, outcome: Outcome) -> None:
        """Write down an outcome; half a line, of a process that was killed over it, counts as none."""
        line = {name: getattr(outcome, name) for name in ("rows", "counts", "settled", "failures")}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("ab") as file:
            broken = file.tell() and not ends_line(self.file)
            file.write((b"\n" if broken else b"") + json.dumps(line).encode() + b"\n")
        self._take(line)

    def finish(self, order: Mapping[str, int], styles: Mapping[str, int], rev: str) -> None:
        """Write the table, last, and what is known beside it; the journal is then of no use.

        Args:
            order, styles: places of clips and styles in the table.
            rev: of all its captions.
        """

        def place(item: tuple[str, str]) -> tuple[int, int]:
            return order[item[0]], styles.get(item[1], -1)

        failures = [self.failures[item] for item in sorted(self.failures, key=place)]
        kept = {"counts": dict(sorted(self.counts.items())), "failures": failures}
        with replacing(self.table.with_suffix(".json")) as temporary:
            temporary.write_text(json.dumps(rounded(kept), indent=1) + "\n", encoding="utf-8")
        write_captions(self.table, [{**self.rows[item], "rev": rev} for item in sorted(self.rows, key=place)])
        self.file.unlink(missing_ok=True)


def lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the whole lines of a journal."""
    for line in file.read_bytes().splitlines() if file.is_file() else []:
        try:
            yield json.loads(line)
        except ValueError:
            continue


def ends_line(file: Path) -> bool:
    """Return whether a file's last byte ends a line."""
    with file.open("rb") as opened:
        opened.seek(-1, 2)
        return opened.read() == b"\n"


def rounded(node: Any) -> Any:
    """Return nested values with sums of shares as they are whatever the order in which they were added."""
    if isinstance(node, dict):
        return {key: rounded(value) for key, value in node.items()}
    return round(node, 6) if isinstance(node, float) else node
