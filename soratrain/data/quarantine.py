"""Samples that cannot be read: each noted once in a run, and too many of them stop it.

The JSON-lines file is the count: every worker of every rank adds to it and reads it, so that the limit holds for the
run and not for each of its processes, and a run that goes on remembers.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
from pathlib import Path

from soratrain.data.manifest import Row
from soratrain.errors import DataError

log = logging.getLogger(__name__)
ALWAYS_ALLOWED = 3  # samples


class Quarantine:
    """What one process knows of the unreadable samples of a run.

    Args:
        path: the file, on a disk that all ranks share; None keeps them in the log only, and counts this process's.
        folder: of the shards.
        max_bad: share of the samples that may be unreadable.
        samples: how many there are.
    """

    def __init__(self, path: str | Path | None, folder: str, max_bad: float, samples: int) -> None:
        self.path, self.folder, self.max_bad, self.samples = Path(path) if path else None, folder, max_bad, samples
        self.keys: set[str] = set()

    def add(self, row: Row, step: int, reason: str) -> None:
        """Note an unreadable sample.

        It is tried again when it comes again: a clip may be damaged in a part that another draw does not need, and
        what a step sees must not depend on what came before.

        Raises:
            DataError: there are too many.
        """
        if row.key in self.keys:
            return
        self.keys.add(row.key)
        log.warning("sample %s of %s is replaced by another: %s", row.key, row.shard, reason)
        if self.path is not None:
            self._write(row, step, reason)
        if len(self.keys) > max(ALWAYS_ALLOWED, self.max_bad * self.samples):
            raise DataError(
                f"{len(self.keys)} samples of {self.folder} cannot be read, more than"
                f" data.max_bad={self.max_bad} allows; the last: {row.key}: {reason}"
            )

    def _write(self, row: Row, step: int, reason: str) -> None:
        """Add a line where no process has yet, and learn of what others found."""
        assert self.path is not None
        self.path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        with os.fdopen(handle, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
            lines = file.readlines()
            found = {key for line in lines if (key := _key_of(line))}
            if row.key not in found:
                line = json.dumps({"key": row.key, "shard": row.shard, "step": step, "reason": reason}) + "\n"
                torn = bool(lines) and not lines[-1].endswith(b"\n")  # by a process that was killed
                os.write(
                    handle, (torn * "\n" + line).encode()
                )  # one write, for disks whose locks do not reach other nodes
        self.keys |= found


def _key_of(line: bytes) -> str | None:
    """Return the key in a line; None for one that a killed process left unfinished."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found.get("key") if isinstance(found, dict) else None
