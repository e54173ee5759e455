"""What the processes of a node share: arrays in files, made by the process that first needs them.

The pages of a mapped file are in memory once, however many ranks and loader processes look at it. The files lie in
`SORATRAIN_NODE_DIR`, else in the system's folder for temporary ones; what nobody has opened for a month goes when the
next is made.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from soratrain.errors import DataError

UNUSED = 30 * 86_400  # seconds
VARIABLE = "SORATRAIN_NODE_DIR"
MEND = f"set {VARIABLE} to a folder of your own on a local disk with room"


def root() -> Path:
    """Return the folder of what this user's processes share. Raises DataError where it is somebody else's."""
    folder = Path(os.environ.get(VARIABLE) or Path(tempfile.gettempdir()) / f"soratrain-{os.getuid()}")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder} cannot be made: {error.strerror}; {MEND}") from error
    if folder.stat().st_uid != os.getuid():
        raise DataError(f"{folder} belongs to another user; {MEND}")
    return folder


def shared(name: str, make: Callable[[Path], None]) -> Path:
    """Return the folder `name`, filled by `make` in the first process of this node that asks; the others wait for it.

    `name` must identify what is in it. Raises DataError where the disk is full.
    """
    folder, temporary = root() / name, root() / f".{name}.{os.getpid()}"
    try:
        with (root() / f"{name}.lock").open("ab") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.utime(lock.fileno())  # in use: nobody tidies it away
            if not folder.is_dir():
                _tidy()
                shutil.rmtree(temporary, ignore_errors=True)  # of a process that was killed and had the same number
                try:
                    temporary.mkdir()
                    make(temporary)
                    temporary.rename(folder)
                finally:
                    shutil.rmtree(temporary, ignore_errors=True)
        os.utime(folder)
    except OSError as error:
        raise DataError(f"{folder} cannot be written: {error.strerror or error}; {MEND}") from error
    return folder


def new_array(path: Path, dtype: np.dtype | type | str, count: int) -> np.ndarray:
    """Return an array in a new file, to be filled. Raises OSError where the disk has no room for it.

    The room is set aside at once: a disk that is full only when a mapped page is written kills the process (SIGBUS).
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=(count,))
    if hasattr(os, "posix_fallocate"):  # not on macOS
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def mapped(path: Path) -> np.ndarray:
    """Return the array in a file, without reading it."""
    return np.load(path, mmap_mode="r")


def _tidy() -> None:
    for path in root().iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process tidies too
            if time.time() - path.stat().st_mtime > UNUSED:
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
