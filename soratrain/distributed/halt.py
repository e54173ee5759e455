"""One rank's reason to stop becomes every rank's, within seconds.

A rank that fails leaves the others in a collective that will never complete. So it leaves its reason in the store
through which the ranks found each other; a thread of each other rank looks there, says the reason and ends its
process, wherever its main thread waits. The first reason is the cause: what other ranks meet because of it (a closed
connection, a message that never came) is not said. A rank that fails of a mistake in the code shows its traceback
before any other knows of it.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from soratrain import again
from soratrain.errors import UserError

T = TypeVar("T")
KEY = "soratrain/halt"  # the reason
CLAIM = "soratrain/claim"  # whose reason it is
EVERY = 0.5  # seconds between two looks
LINGER = 3.0  # seconds for the others to see it, before this process and perhaps the store are gone
PATIENCE = 20.0  # seconds in which the rank that has caused a lost connection is heard of
DEADLINE = 30.0  # seconds in which a rank that has said its reason tidies up
USERS, OURS = 2, 1  # exit codes: what the user can mend, and all else
LOST = re.compile(
    r"connection (was )?(closed|reset|refused)|closed by peer|broken pipe|timed? ?out|NCCL|gloo|recvBytes|aborted", re.I
)
GOES_ON = "the same command goes on from the last checkpoint"
DIED = "another process of this run has died"  # what a rank says that knows no more
_watched: set[int] = set()  # processes in which the thread runs
_over = threading.Event()
_telling = threading.Lock()  # taken by the thread that tells why this process ends, which then ends it
_last: list[Callable[[], None]] = []  # what is done before this process is ended from a thread
_keepers: list[Callable[[str], None]] = []  # who writes down why it was


def together() -> bool:
    """Return whether this process trains with others."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def speaks() -> bool:
    """Return whether this process is the one that says what all know."""
    return not together() or dist.get_rank() == 0


def own_store() -> Any:
    """Return a connection to the store of its own: in a shared one each waits for the others' answers."""
    store: Any = _get_default_store()
    return store.clone()


def watch() -> None:
    """Begin to look, once a process, whether another rank has stopped."""
    if not together() or os.getpid() in _watched:
        return
    _watched.add(os.getpid())
    thread = threading.Thread(target=_look, args=(own_store(),), name="halt", daemon=True)
    thread.start()
    atexit.register(_end, thread)


def cease() -> None:
    """Look no more: this process has a reason of its own to end, and the store goes with whoever ends first."""
    _over.set()


def at_end(act: Callable[[], None]) -> None:
    """Have `act` done before this process is ended from a thread, as it is when another rank has failed."""
    _last.append(act)


def forget(act: Callable[[], None]) -> None:
    """Undo `at_end`."""
    _last.remove(act)


@contextmanager
def kept(keep: Callable[[str], None]) -> Iterator[None]:
    """Have `keep` told the reason where this process is ended from a thread inside the block."""
    _keepers.append(keep)
    try:
        yield
    finally:
        _keepers.remove(keep)


def claim() -> bool:
    """Return whether no rank has stopped before this one, so that its reason is the cause; the others then wait."""
    own = str(dist.get_rank())
    return ask(lambda: _get_default_store().compare_set(CLAIM, "", own).decode() == own, True)


def announce(reason: str, code: int = USERS, show: Sequence[int] = ()) -> bool:
    """Tell all ranks to stop, because of `reason`, and let them have time to hear it; return whether it was the first.

    Another reason may be that of another rank, or of another thread of this process: neither is said twice.

    Args:
        reason: one line.
        code: the exit code of the ranks that hear it.
        show: ranks that are to show where they stand in the code.
    """
    if not together() or not _telling.acquire(blocking=False):
        return False
    if not claim():
        _telling.release()
        return False
    text = json.dumps({"rank": dist.get_rank(), "reason": reason, "code": code, "show": list(show)})
    ask(lambda: _get_default_store().set(KEY, text), None)
    time.sleep(LINGER)
    return True


def failed(error: BaseException) -> None:
    """Tell all ranks of an exception that ends this one: its traceback first, unless the user can mend it.

    An exception that is but the consequence of another rank's end waits for that rank's reason, which ends this
    process. One whose traceback is shown here has `shown` set, and need not be shown again.
    """
    if not together() or isinstance(error, KeyboardInterrupt | SystemExit):
        return
    watch()
    if DIED in str(error):
        time.sleep(PATIENCE)
    if isinstance(error, UserError):
        if not error.alike:  # else all ranks have found it, and the first says it
            announce(str(error))
        return
    if LOST.search(f"{type(error).__name__}: {error}"):
        time.sleep(PATIENCE)
    if not claim():
        time.sleep(PATIENCE)  # the other's reason is on its way, and with it the end
        return
    threading.Thread(target=_expire, args=(DEADLINE,), name="deadline", daemon=True).start()
    words = "".join(traceback.format_exception(error))
    sys.stderr.write(f"rank {dist.get_rank()} failed:\n{words}")
    sys.stderr.flush()
    error.shown = True  # type: ignore[attr-defined]
    last = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    announce(f"rank {dist.get_rank()} failed: {last}; its traceback is above, or in its log", OURS)


def end(words: str, code: int) -> None:
    """Say `words` and end this process from a thread: its main thread may be where nothing interrupts it."""
    visible = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar has hidden the cursor
    sys.stderr.write(f"{visible}error: {again.told(words)}\n")
    sys.stderr.flush()
    for keep in _keepers:
        ask(partial(keep, words), None)  # a disk that does not answer is not waited for
    for act in _last:
        act()
    os._exit(code)


def standing() -> str:
    """Return where this process's main thread is in the code."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    return "".join(traceback.format_stack(frame)) if frame else ""


def _expire(seconds: float) -> None:
    """End this process if it still tidies up: that may wait for another rank."""
    time.sleep(seconds)
    for act in _last:
        act()
    os._exit(OURS)


def ask(question: Callable[[], T], otherwise: T) -> T:
    """Return what the store answers; `otherwise` where it is gone, or does not answer in time."""
    answers = [otherwise]

    def work() -> None:
        try:
            answers.append(question())
        except RuntimeError:
            return

    thread = threading.Thread(target=work, name="ask", daemon=True)
    thread.start()
    thread.join(LINGER)
    return answers[-1]


def _end(thread: threading.Thread) -> None:
    """Let the thread end before Python does: one that is inside the store by then takes the whole process with it."""
    _over.set()
    thread.join(LINGER)


def _look(store: dist.Store) -> None:
    own = dist.get_rank()
    while not _over.wait(EVERY) and dist.is_initialized():
        try:
            said = json.loads(store.get(KEY)) if store.check([KEY]) else None
        except RuntimeError:  # the store went with the rank that held it: an end of the run like any other
            return
        if said is None:
            continue
        if own in said["show"]:
            sys.stderr.write(f"rank {own} stands here:\n{standing()}")
        if said["rank"] != own:
            whose = f"rank {said['rank']}: " if said["code"] == USERS else ""
            end(whose + said["reason"], said["code"])
        return
