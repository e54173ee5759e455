"""The processes of a job as their node sees them: whether one still runs, is stopped, or has gone."""

from __future__ import annotations

import json
import os
import signal
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

RUNS, STOPPED, GONE, UNKNOWN = "runs", "is stopped", "has gone", "is on another node"


def _namespace() -> str:
    """Return what two processes have in common that know each other by number; empty where that cannot be told."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _stat(pid: int) -> tuple[str, str]:
    """Return a process's state and when it was started, as its node counts; empty where there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]  # proc(5): the 3rd and the 22nd


@dataclass(frozen=True)
class Card:
    """A process's name on its node.

    Attributes:
        host: the node.
        namespace: in which the number holds.
        pid, begun: its number, and when it was started: numbers are given out again.
    """

    host: str
    namespace: str
    pid: int
    begun: str

    @classmethod
    def own(cls) -> Card:
        """Return this process's."""
        return cls(socket.gethostname(), _namespace(), os.getpid(), _stat(os.getpid())[1])

    @classmethod
    def read(cls, text: str | bytes) -> Card:
        """Return what `text` says."""
        return cls(**json.loads(text))

    def text(self) -> str:
        """Return it as text."""
        return json.dumps(asdict(self))

    def state(self) -> str:
        """Return what that process does."""
        if not self.namespace or self.namespace != _namespace():
            return UNKNOWN
        state, begun = _stat(self.pid)
        if begun != self.begun or state in ("Z", "X", ""):
            return GONE
        return STOPPED if state in ("T", "t") else RUNS

    def kill(self) -> None:
        """End it if it is stopped, since it will not end by itself."""
        if self.state() == STOPPED:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(self.pid, signal.SIGKILL)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"
