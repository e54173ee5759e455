"""Longer prompts that were made before, in a file of JSON lines, so that the same command draws the same clips."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

NAME = "expanded.jsonl"  # in the stage's folder


class Cache:
    """What was made of each prompt, by a hash of all that it was made from.

    A line is written at a time, as soon as it is known. One that was cut short by the end of a process is passed over.

    Args:
        folder: where the file lies, or will.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / NAME
        self.found: dict[str, str] = {}
        self._ended = True  # whether the file ends with a whole line
        if not self.path.is_file():
            return
        data = self.path.read_bytes()
        self._ended = not data or data.endswith(b"\n")
        for line in data.decode("utf-8", "replace").split("\n"):
            try:
                row = json.loads(line)
                key, expanded = row["key"], row["expanded"]
            except (ValueError, KeyError, TypeError, RecursionError):
                continue
            if isinstance(key, str) and isinstance(expanded, str) and expanded.strip():
                self.found[key] = expanded

    def get(self, key: str) -> str | None:
        """Return what was made before."""
        return self.found.get(key)

    def put(self, key: str, expanded: str, **more: Any) -> None:
        """Keep what was made; `more` is for people who read the file."""
        self.found[key] = expanded
        line = json.dumps({"key": key, "expanded": expanded, **more}, ensure_ascii=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(("" if self._ended else "\n").encode() + line.encode())
        self._ended = True
