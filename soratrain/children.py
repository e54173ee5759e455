"""Processes of our own: running a command of the chain, and saying how one has ended."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence


def run_child(words: Sequence[str]) -> int:
    """Run a command to its end and return its exit code.

    Ctrl-C reaches the child too, which then saves what it has; it is waited for, so that nothing is cut short.

    Raises:
        KeyboardInterrupt: Ctrl-C came, or the child says that it was interrupted; the child has ended.
    """
    interrupted = False
    with subprocess.Popen(list(words)) as process:
        while True:
            try:
                code = process.wait()
                break
            except KeyboardInterrupt:
                interrupted = True
    if interrupted or code in (130, -2):
        raise KeyboardInterrupt
    return code


def ended_by(code: int) -> str:
    """Return in words how a process has ended, by its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else "unknown"
    why = ", mostly for want of memory" if -code == signal.SIGKILL else ""
    return f"was killed by signal {-code} ({name}){why}"
