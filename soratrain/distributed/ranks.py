"""The processes that share a job: those that a launcher has started (torchrun, srun), or that the first one starts.

A job's work is cut into units whose results do not depend on who does them; `deal` says which rank does which. Ranks
meet twice, over gloo: before any of them writes, and when all are done.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from soratrain import slurm
from soratrain.distributed.mesh import Mesh
from soratrain.errors import DataError, UserError

T = TypeVar("T")
ARRIVAL = timedelta(minutes=30)  # how long the first to come waits for the last
LONGEST = timedelta(days=30)  # how long one that has done its part waits; one that has died is noticed at once
PARENT = "SORATRAIN_PARENT"  # the process that started this one


class ElsewhereError(DataError):
    """What another rank of this job has said."""


def number(*names: str) -> int | None:
    """Return the first of some environment variables that is a number."""
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), None)


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Return the units of each rank: the most costly first, each to whom has least.

    It depends on the costs alone, so that every rank knows it of all, and any number of ranks shares the same units.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for unit in sorted(range(len(costs)), key=lambda unit: (-costs[unit], unit)):
        least = loads.index(min(loads))
        shares[least].append(unit)
        loads[least] += costs[unit]
    return [sorted(share) for share in shares]


@dataclass
class Ranks:
    """This process among those that share a job.

    Attributes:
        rank, size: its number, and how many there are.
        local: its number on this node.
        group: over which they meet.
        before: the number among all of a job's ranks of the first of these, where they are but some of them.
    """

    rank: int = 0
    size: int = 1
    local: int = 0
    group: Any = None
    before: int = 0

    @classmethod
    @contextmanager
    def joined(cls) -> Iterator[Ranks]:
        """Meet the others that the launcher has started, if any, and part from them at the end.

        Raises:
            DataError: they did not come.
        """
        size = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") or 1
        rank, local = number("RANK", "SLURM_PROCID", "LOCAL_RANK") or 0, number("LOCAL_RANK", "SLURM_LOCALID") or 0
        if size == 1:
            yield cls(local=local)
            return
        slurm.meet()
        try:
            dist.init_process_group("gloo", rank=rank, world_size=size, timeout=ARRIVAL)
            group = dist.new_group(timeout=LONGEST)
        except (RuntimeError, ValueError) as error:
            raise DataError(f"the {size} processes of this job did not find each other ({error})") from error
        try:
            yield cls(rank, size, local, group)
        finally:
            dist.destroy_process_group()

    @property
    def first(self) -> bool:
        """Whether this is the one that speaks for all."""
        return self.rank == 0

    def team(self, mesh: Mesh, group: Any) -> Ranks:
        """Return this process among those of its group in `mesh`, which meet over `group`."""
        return Ranks(mesh.place, mesh.sequence, self.local, group, before=self.rank - mesh.place)

    def check(self) -> None:
        """Go no further where the process that started this one has died: its heir may be at work already.

        Raises:
            DataError: it has.
        """
        parent = number(PARENT)
        if parent is not None and os.getppid() != parent:
            raise DataError("the process that started this one has ended; the same command goes on")

    def together(self, work: Callable[[], T]) -> list[T]:
        """Return what `work` gives on every rank, in their order; where it fails on one, it fails on all.

        Raises:
            UserError: what this rank's work says.
            DataError: what another's says, or that another has died.
        """
        failure: UserError | OSError | None = None
        result: Any = None
        try:
            result = work()
        except (UserError, OSError) as error:
            failure = error
        whose = "" if isinstance(failure, ElsewhereError) else f"rank {self.before + self.rank}: "
        said = None if failure is None else f"{whose}{failure}"
        found: list[Any] = [(result, said)]
        if self.size > 1:
            found = [None] * self.size
            try:
                dist.all_gather_object(found, (result, said), self.group)
            except RuntimeError as error:
                if failure is None:
                    raise DataError("another process of this job has died; the same command goes on") from error
        if failure is not None:
            raise failure
        for _, said in found:
            if said is not None:
                raise ElsewhereError(said)
        return [result for result, _ in found]


@contextmanager
def started(count: int, words: Sequence[str]) -> Iterator[None]:
    """Be the first of `count` processes of one job: start the others, with the same command, and see them end.

    Where a launcher has started this one, it is the launcher that counts.

    Args:
        words: of the command line, after `python -m soratrain`.

    Raises:
        DataError: one of them failed.
    """
    if count == 1 or (number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") or 1) > 1:
        yield
        return
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    threads = max(1, (os.cpu_count() or 1) // count)
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    before = dict(os.environ)
    others = []
    try:
        for rank in range(1, count):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank), PARENT: str(os.getpid())}
            environment = {"OMP_NUM_THREADS": str(threads), **before, **common, **own}
            others.append(subprocess.Popen([sys.executable, "-m", "soratrain", *words], env=environment))
        if "OMP_NUM_THREADS" not in before:
            torch.set_num_threads(threads)
        os.environ.update(common, RANK="0", LOCAL_RANK="0")
        yield
        codes = [process.wait() for process in others]
    except BaseException:
        for process in others:
            process.terminate()
        for process in others:
            process.wait()
        raise
    finally:
        os.environ.clear()
        os.environ.update(before)
    if any(codes):
        raise DataError(f"the other processes of this job ended with the codes {codes}; the same command goes on")
