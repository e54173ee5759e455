"""Writing checkpoints, while training goes on where there is memory for a copy of what is saved.

A save takes a copy, laid out as the file will be, and hands it to a thread: it writes this rank's file under a
temporary name, with its checksum, and has the disk keep it; when all ranks have done so, the first writes `state.json`
and renames the folder. The threads talk over a group of their own, so that no message of the training's waits for a
disk. Whether all have finished, ranks agree on at the end of a step; what went wrong on one is then said on all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from soratrain.amounts import memory
from soratrain.data.atomic import sync
from soratrain.distributed.checkpoint import FORMAT, gather, own_place, part_of, with_checksum
from soratrain.distributed.halt import DIED
from soratrain.distributed.image import Image
from soratrain.distributed.room import available
from soratrain.distributed.rounds import Rounds
from soratrain.errors import DataError, UserError, on_all_ranks
from soratrain.models import tensor_file
from soratrain.models.tensor_file import Form, Layout

log = logging.getLogger(__name__)

SHARE = 0.5  # of the free memory that copies may take


@dataclass
class Save:
    """One checkpoint on its way to disk.

    Attributes:
        folder: where it will be.
        layout: of this rank's file, None where it has nothing to save.
        pieces: the bytes of the file after its header.
        starts, state: as `Saver.save` takes them.
        given_up: set to stop writing.
        problem: what went wrong on any rank, None where it is whole.
    """

    folder: Path
    layout: Layout | None
    pieces: Iterable[memoryview]
    starts: Mapping[str, int]
    state: Mapping[str, Any]
    given_up: threading.Event = field(default_factory=threading.Event)
    problem: str | None = "it was not finished"


class Saver:
    """Writes one checkpoint at a time; every rank calls the same methods in the same order.

    Args:
        beside: write while training goes on, where there is memory for it.
        after: called on the first rank with the folder of each checkpoint that has become whole.
        timeout: how long a rank waits for another that writes its part and comes no further; None for torch's half
            hour.
        moved: called whenever more is written for which training waits.
    """

    def __init__(
        self,
        *,
        beside: bool = True,
        after: Callable[[Path], None] | None = None,
        timeout: timedelta | None = None,
        moved: Callable[[], None] = lambda: None,
    ) -> None:
        self.beside, self.after, self.timeout, self.moved = beside, after, timeout, moved
        self.waiting = False  # whether training does
        self.groups: tuple[Any, Any] = (None, None)  # of the threads, and of the steps' ends
        self.ready = False
        self.image = Image()
        self.decided = not beside
        self.under_way: tuple[Save, threading.Thread] | None = None

    def open(self) -> None:
        """Get ready to write while training goes on; collective."""
        if self.beside and not self.ready and own_place()[1] > 1:
            one, other = (dist.new_group(backend="gloo", timeout=self.timeout) for _ in range(2))
            self.groups = (one, other)
        self.ready = True

    def save(
        self,
        folder: Path,
        tensors: Mapping[str, Tensor],
        starts: Mapping[str, int],
        state: Mapping[str, Any],
        *,
        wait: bool = False,
    ) -> None:
        """Write a checkpoint, or begin to; the one under way, if any, is finished first.

        Args:
            folder: where it will be.
            tensors: flat fragments of this rank by `<kind>/<name>`; may be empty.
            starts: where each begins in its parameter.
            state: what else belongs to it: plain values, the same on every rank.
            wait: for all of it to be written.

        Raises:
            DataError: on every rank, where one could not write; what was there before stays.
        """
        self.wait()
        rank, _ = own_place()
        state = json.loads(json.dumps(state))  # of the present step, whatever becomes of what it was taken from
        said = None
        if rank == 0:
            try:
                shutil.rmtree(part_of(folder), ignore_errors=True)
                part_of(folder).mkdir(parents=True)
            except OSError as error:
                said = told(rank, error)
        problem = next((one for one in gather(said) if one), None)
        if problem is not None:
            raise not_written(folder, problem)
        layout = Layout.of({key: Form.of(value) for key, value in tensors.items()}) if tensors else None
        beside = not wait and self.ready and self.has_room(0 if layout is None else layout.nbytes)
        pieces = self.copied(layout, tensors) if beside else None
        if pieces is None:
            names = [] if layout is None else list(layout.starts)
            save = Save(folder, layout, (tensor_file.raw(tensors[name]) for name in names), starts, state)
            with self.waited_for():
                self.write(save, None)
            if save.problem is not None:
                raise not_written(folder, save.problem)
            return
        save = Save(folder, layout, pieces, starts, state)
        thread = threading.Thread(target=self.write, args=(save, self.groups[0]), name="checkpoint")
        self.under_way = (save, thread)
        thread.start()

    def poll(self) -> None:
        """Finish the save under way if all ranks have written it; every rank calls it at the end of a step.

        Raises:
            DataError: on every rank, where one could not write; what was there before stays.
        """
        if self.under_way is None:
            return
        done = torch.tensor([not self.under_way[1].is_alive()], dtype=torch.int32)
        if self.groups[1] is not None:
            dist.all_reduce(done, op=dist.ReduceOp.MIN, group=self.groups[1])
        if done:
            self.wait()

    def wait(self) -> None:
        """Wait for the save under way, if any.

        Raises:
            DataError: on every rank, where one could not write; what was there before stays.
        """
        if self.under_way is None:
            return
        save, thread = self.under_way
        with self.waited_for():
            thread.join()
        self.under_way = None
        if save.problem is not None:
            raise not_written(save.folder, save.problem)

    @contextmanager
    def waited_for(self) -> Iterator[None]:
        """What is written inside the block, training waits for."""
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False

    def came_further(self) -> None:
        """Say so, where training waits for it."""
        if self.waiting:
            self.moved()

    def give_up(self) -> None:
        """Stop the save under way, if any, and leave nothing of it."""
        if self.under_way is not None:
            self.under_way[0].given_up.set()

    def close(self) -> None:
        """Give the copy's memory back; nothing may be under way."""
        self.image.free()

    def copied(self, layout: Layout | None, tensors: Mapping[str, Tensor]) -> Iterable[memoryview] | None:
        """Return the bytes of a copy; None on every rank where one got no memory for it, as from then on."""
        pieces: Iterable[memoryview] = []
        said = None
        try:
            pieces = self.image.take(layout, tensors) if layout is not None else []
        except (MemoryError, RuntimeError) as error:  # the latter is what torch says
            if isinstance(error, RuntimeError) and not re.search("memory|allocat", str(error)):
                raise
            said = told(own_place()[0], error)
        problem = next((one for one in gather(said) if one), None)
        if problem is None:
            return pieces
        self.beside = False
        for _ in pieces:  # a GPU may still be copying
            pass
        self.image.free()
        if own_place()[0] == 0:
            log.warning("checkpoints are written while training waits: there was no memory for a copy (%s)", problem)
        return None

    def has_room(self, nbytes: int) -> bool:
        """Return whether every node has memory for its ranks' copies, decided and said at the first save."""
        if self.decided:
            return self.beside
        self.decided = True
        known = gather((socket.gethostname(), nbytes, available(torch.device("cpu"))))
        hosts = {host: [(size, free) for name, size, free in known if name == host] for host, _, _ in known}
        sums = [(sum(size for size, _ in ranks), min(free for _, free in ranks)) for ranks in hosts.values()]
        needed, free = max(sums, key=lambda pair: pair[0] / max(pair[1], 1))
        self.beside = needed <= SHARE * free
        if own_place()[0] == 0:
            most = f"{memory(needed)} a node" if len(known) > 1 else memory(needed)
            if self.beside:
                log.info("checkpoints are written while training goes on, from a copy of %s in the CPU's memory", most)
            else:
                log.warning(
                    "checkpoints are written while training waits: a copy of %s would take more than half of the %s"
                    " that are free",
                    *(most, memory(free)),
                )
        return self.beside

    def write(self, save: Save, group: Any) -> None:
        """Write a checkpoint and set its `problem`; collective over `group`."""
        rank, ranks = own_place()
        part, report = part_of(save.folder), dict[str, Any]()
        rounds = Rounds(group, self.came_further)

        def given_up() -> bool:
            rounds.go_on()
            return save.given_up.is_set()

        try:
            if save.layout is not None:
                path = part / f"rank-{rank:05d}.safetensors"
                size, crc = tensor_file.write(path, save.layout.header, save.pieces, given_up)
                report = {"file": path.name, "bytes": size, "crc32": crc, "starts": dict(save.starts)}
        except Exception as error:  # noqa: BLE001 - whatever it is, all ranks hear of it, and the last one stands
            report = {"error": told(rank, error)}
        try:
            rounds.end()
            reports = gather(report, group)
            said = next((item["error"] for item in reports if "error" in item), None)
            if rank == 0:
                said = self.finish(save, part, ranks, [item for item in reports if item], said)
            save.problem = gather(said, group)[0]
        except RuntimeError:  # a rank has gone, and the group with it
            save.problem = DIED

    def finish(
        self, save: Save, part: Path, ranks: int, reports: list[dict[str, Any]], problem: str | None
    ) -> str | None:
        """Make a checkpoint whole, on the first rank, or remove its parts; return what went wrong on any."""
        if problem is None:
            try:
                files = {item.pop("file"): item for item in reports}
                state = {"format": FORMAT, "ranks": ranks, **save.state, "files": files}
                (part / "state.json").write_text(with_checksum(state))
                sync(part / "state.json")
                sync(part)
                shutil.rmtree(save.folder, ignore_errors=True)
                os.replace(part, save.folder)
                sync(save.folder.parent)
            except Exception as error:  # noqa: BLE001 - as above
                problem = told(0, error)
        if problem is not None:
            shutil.rmtree(part, ignore_errors=True)
            return problem
        try:
            if self.after is not None:
                self.after(save.folder)
        except Exception as error:  # noqa: BLE001 - this one is whole whatever becomes of older ones
            log.warning("%s is written, but older checkpoints were not removed (%s)", save.folder, told(0, error))
        return None


def told(rank: int, error: Exception) -> str:
    """Return in a line what went wrong on a rank."""
    known = isinstance(error, OSError | RuntimeError | MemoryError)
    words = " ".join(str(getattr(error, "strerror", None) or error).split())
    if isinstance(error, MemoryError):
        words = words or "out of memory"
    return f"rank {rank}: {words if known else f'{type(error).__name__}: {words}'}"


def not_written(folder: Path, problem: str) -> UserError:
    """Return the error that says so."""
    said = f"checkpoint {folder} was not written ({problem}); the one before stands:"
    if problem == DIED:  # perhaps the first, which would speak for all
        return DataError(f"{said} give the same command again")
    return on_all_ranks(DataError(f"{said} free space there and give the same command again, or choose another `run`"))
