"""Run a command of the chain as a process of its own."""

from __future__ import annotations

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
