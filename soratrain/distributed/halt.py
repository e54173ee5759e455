"""One rank's reason to stop becomes every rank's, within seconds.

A rank whose data fail leaves the others in a collective that will never complete. So it leaves its reason in the
store through which the ranks found each other; a thread of each other rank looks there, says the reason and ends its
process, wherever its main thread waits.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

KEY = "soratrain/halt"
EVERY = 0.5  # seconds between two looks
LINGER = 3.0  # seconds for the others to see it, before this process and perhaps the store are gone
_watched: set[int] = set()  # processes in which the thread runs
_over = threading.Event()


def together() -> bool:
    """Return whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def speaks() -> bool:
    """Return whether this process is the one that says what all know."""
    return not together() or dist.get_rank() == 0


def watch() -> None:
    """Begin to look, once a process, whether another rank has stopped."""
    if not together() or os.getpid() in _watched:
        return
    _watched.add(os.getpid())
    thread = threading.Thread(target=_look, name="halt", daemon=True)
    thread.start()
    atexit.register(_end, thread)


def announce(reason: str) -> None:
    """Tell all ranks to stop, because of `reason`; return when they have had time to hear it."""
    if not together():
        return
    store = _get_default_store()
    if not store.check([KEY]):
        store.set(KEY, f"{dist.get_rank()} {reason}")
    time.sleep(LINGER)


def _end(thread: threading.Thread) -> None:
    """Let the thread end before Python does: one that is inside the store by then takes the whole process with it."""
    _over.set()
    thread.join(LINGER)


def _look() -> None:
    store, own = _get_default_store(), dist.get_rank()
    while not _over.wait(EVERY) and dist.is_initialized():
        try:
            said = store.get(KEY).decode() if store.check([KEY]) else None
        except RuntimeError:  # the store went with the rank that held it: an end of the run like any other
            return
        if said is not None and int(said.split(" ", 1)[0]) != own:
            rank, reason = said.split(" ", 1)
            sys.stderr.write(f"error: rank {rank}: {reason}\n")
            sys.stderr.flush()
            os._exit(2)  # the main thread may be inside a collective that nothing interrupts
