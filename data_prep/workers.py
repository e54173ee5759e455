"""The processes that do units of work, each watched: a file that hangs, explodes or crashes a decoder costs one file.

A worker says which file it is at and that frames come (pulse.py). One that shows no sign of life for `limits.seconds`,
takes more memory than `limits.memory_gb`, or dies, is replaced; the file it was at is written down beside the unit with
the reason (`NNNNNN.skip.json`), and the unit is done again without it. So a resumed build does not fall into it twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import psutil

from data_prep import pulse
from data_prep.pack import Report, Unit, write_unit
from soratrain.data.atomic import replacing
from soratrain.errors import DataError

CONTEXT = multiprocessing.get_context("spawn")
LOOK = 0.25  # seconds between looks at a worker's memory and pulse
HEADROOM = 2.0  # address space is larger than what is used of it: the hard limit behind the watched one
MARGIN = 2 << 30  # bytes of address space that a worker may take besides


@dataclass(frozen=True)
class Limits:
    """What one file may take: seconds without a sign of progress, and memory."""

    seconds: float = 60.0
    memory_gb: float = 4.0

    @property
    def bytes(self) -> int:
        """The memory in bytes."""
        return int(self.memory_gb * 2**30)


@dataclass(frozen=True)
class Doing:
    """What a worker is at: file `file` (or pulse.NOWHERE) of unit `number`, since a time of `time.monotonic()`."""

    number: int
    file: int
    since: float


def do_units(
    folder: Path,
    units: Sequence[Unit] | Mapping[int, Unit],
    pending: Sequence[int],
    *,
    processes: int,
    limits: Limits,
    done: Callable[[int], None],
    doing: Callable[[list[Doing]], None] = lambda workers: None,
) -> None:
    """Do the `pending` units and leave their results in `folder`; `done` is told the number of each as it ends.

    `doing` is told a few times a second what the workers are at. An interruption loses only what is under way.

    Raises:
        DataError: a worker died outside any file.
        Exception: what a worker raised that was no fault of a file (a full disk, say).
    """
    queue = deque(pending)
    seats = [Seat(folder, limits) for _ in range(min(processes, len(queue)))]
    try:
        while queue or any(seat.busy for seat in seats):
            for seat in seats:
                if not seat.busy and queue:
                    number = queue.popleft()
                    seat.give(number, units[number])
            wait([end for seat in seats if seat.busy for end in seat.ends], timeout=LOOK)
            for seat in seats:
                if seat.busy and seat.look():
                    done(seat.number)
            doing([seat.doing for seat in seats if seat.busy])
    finally:
        for seat in seats:
            seat.end()


class Seat:
    """One worker process and its successors, and the unit it has."""

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder, self.limits = folder, limits
        self.busy, self.number = False, -1
        self._unit: Unit | None = None
        self._process: Any = None
        self._pipe: Connection | None = None
        self._cell: Any = None
        self._seen, self._since = 0, 0.0
        self._file, self._began = pulse.NOWHERE, 0.0  # the file that it is at, and since when
        self._killed: set[tuple[int, int]] = set()  # (unit, file) at which somebody killed the process once

    @property
    def ends(self) -> list[Any]:
        """What to wait on: a message, or the process's end."""
        return [self._pipe, self._process.sentinel]

    @property
    def doing(self) -> Doing:
        """What the worker is at."""
        if self._cell[0] != self._file:
            self._file, self._began = self._cell[0], time.monotonic()
        return Doing(self.number, self._file, self._began)

    def give(self, number: int, unit: Unit) -> None:
        """Let the worker do a unit."""
        if self._process is None or not self._process.is_alive():
            self.end()
            self._pipe, theirs = CONTEXT.Pipe()
            self._cell = CONTEXT.RawArray("q", [pulse.NOWHERE, 0])
            arguments = (theirs, self._cell, self.folder, self.limits)
            self._process = CONTEXT.Process(target=serve, args=arguments, daemon=True)
            self._process.start()
            theirs.close()
        assert self._pipe is not None
        self.busy, self.number, self._unit = True, number, unit
        self._cell[0] = pulse.NOWHERE
        self._seen, self._since = self._cell[1], time.monotonic()
        self._file, self._began = pulse.NOWHERE, self._since
        with suppress(BrokenPipeError):  # it died just now, which `look` will find
            self._pipe.send((number, unit, read_skips(self.folder, number)))

    def look(self) -> bool:
        """Return whether the unit is done; a worker in trouble is replaced and the unit begun again."""
        assert self._pipe is not None
        with suppress(EOFError, ConnectionResetError):
            if self._pipe.poll():
                outcome = self._pipe.recv()
                self.busy = False
                if isinstance(outcome, Exception):
                    raise outcome
                return True
        trouble = self._trouble()
        if trouble:
            self._blame(trouble)
        return False

    def end(self) -> None:
        """End the worker, whatever it is at."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            assert self._pipe is not None
            self._pipe.close()
            self._process = None

    def _trouble(self) -> str:
        """Return what is wrong with the worker in plain words; empty where it gets on."""
        code = self._process.exitcode
        if code is not None:
            cause = f"signal {-code}" if code < 0 else f"exit code {code}"
            return f"the decoder crashed ({cause})"
        if self._cell[1] != self._seen:
            self._seen, self._since = self._cell[1], time.monotonic()
        elif self._cell[0] != pulse.NOWHERE and time.monotonic() - self._since > self.limits.seconds:
            return f"decoding it stalled for more than limits.seconds={self.limits.seconds:g}"
        with suppress(psutil.Error):
            if psutil.Process(self._process.pid).memory_info().rss > self.limits.bytes:
                return f"decoding it took more than limits.memory_gb={self.limits.memory_gb:g}"
        return ""

    def _blame(self, trouble: str) -> None:
        """Put the file aside that the worker was at, and begin the unit again without it."""
        killed = self._process.exitcode == -signal.SIGKILL
        self.end()
        file = self._cell[0]
        assert self._unit is not None
        if killed and (self.number, file) not in self._killed:  # perhaps no fault of this file: once is forgiven
            self._killed.add((self.number, file))
            self.give(self.number, self._unit)
            return
        if file == pulse.NOWHERE:
            raise DataError(f"a worker process died outside any file ({trouble}); the same command continues")
        skips = read_skips(self.folder, self.number) | {file: trouble}
        with replacing(self.folder / f"{self.number:06d}.skip.json") as temporary:
            temporary.write_text(json.dumps(skips), encoding="utf-8")
        self.give(self.number, self._unit)


def read_skips(folder: Path, number: int) -> dict[int, str]:
    """Return the files of unit `number` that are left out, and why."""
    path = folder / f"{number:06d}.skip.json"
    return {int(file): why for file, why in json.loads(path.read_text()).items()} if path.is_file() else {}


def do_unit(folder: Path, number: int, unit: Unit, skips: dict[int, str]) -> None:
    """Do one unit and leave its result in `folder`."""
    report = Report()
    write_unit(folder, number, unit.samples(report, skips), report)


def serve(pipe: Connection, cell: Any, folder: Path, limits: Limits) -> None:
    """Do the units that come through `pipe`; answer each with None, or with what was raised."""
    prepare_worker()
    pulse.attach(cell)
    ceiling = psutil.Process().memory_info().vms + int(HEADROOM * limits.bytes) + MARGIN
    resource.setrlimit(resource.RLIMIT_AS, (ceiling, ceiling))
    while True:
        try:
            number, unit, skips = pipe.recv()
        except EOFError:
            return
        try:
            do_unit(folder, number, unit, skips)
        except Exception as error:  # handed on to the process that waits, which raises it
            pipe.send(error)
        else:
            pipe.send(None)


def prepare_worker() -> None:
    """Let Ctrl-C reach only the process that waits, which ends the others; let none outlive it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
