"""The processes that rank 0 starts on its node, seen to their end.

Lightning's own observer kills everything, itself included, five seconds after one has failed, without a word. Here a
process that was killed is named with its signal, and one that has failed has had time to say why.
"""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import lightning as L
from lightning.fabric.utilities.distributed import _set_num_threads_if_needed
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from soratrain.children import ended_by
from soratrain.distributed import halt

EVERY = 0.5  # seconds between two looks
INTERRUPTED = 130  # the exit code after Ctrl-C, of which every process hears by itself


class Launcher(_SubprocessScriptLauncher):
    """Starts the other processes of this node and watches them."""

    def launch(self, function: Callable, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        self.cluster_environment.validate_settings(num_devices=self.num_processes, num_nodes=self.num_nodes)
        if not self.cluster_environment.creates_processes_externally:
            self._call_children_scripts()
            halt.at_end(self.end)
            threading.Thread(target=self.observe, name="children", daemon=True).start()
        _set_num_threads_if_needed(num_processes=self.num_processes)
        return function(*args, **kwargs)

    def observe(self) -> None:
        """End the run when one of the processes has failed; its reason, where it could give one, comes first."""
        while True:
            time.sleep(EVERY)
            codes = [process.poll() for process in self.procs]
            if all(code == 0 for code in codes):
                return
            for number, code in enumerate(codes, 1):
                if code and code != INTERRUPTED:
                    self.failed(number, code)
                    return

    def failed(self, number: int, code: int) -> None:
        """End the run: the process `number` of this node has ended with `code`."""
        rank = self.cluster_environment.node_rank() * self.num_processes + number
        who = f"rank {rank} (process {self.procs[number - 1].pid})"
        if code < 0:
            reason = f"{who} {ended_by(code)}; {halt.GOES_ON}"
            if not halt.announce(reason, halt.OURS) and halt.together():
                time.sleep(halt.PATIENCE)  # another's reason was first
            halt.end(reason, halt.OURS)
        time.sleep(halt.DEADLINE)  # its reason ends this one meanwhile, unless the ranks had not met
        halt.end(f"{who} ended with exit code {code}; its own words are above", code)

    def end(self) -> None:
        """Wait for the processes, and kill those that do not end."""
        deadline = time.monotonic() + halt.LINGER
        for process in self.procs:
            with suppress(subprocess.TimeoutExpired):
                process.wait(max(deadline - time.monotonic(), 0.0))
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)


def adopt(trainer: L.Trainer) -> None:
    """Let `trainer` start its processes by `Launcher`, where it would start any."""
    strategy: Any = trainer.strategy
    old = strategy._launcher
    if isinstance(old, _SubprocessScriptLauncher):
        strategy._launcher = Launcher(old.cluster_environment, old.num_processes, old.num_nodes)
