"""The processes that read ahead."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from functools import partial
from multiprocessing import forkserver, resource_tracker
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from soratrain import slurm
from soratrain.batch import Batch
from soratrain.children import ended_by
from soratrain.data.dataset import MicroBatches
from soratrain.distributed import halt
from soratrain.errors import DataError, UserError

TRIES = 3  # workers are started again so often at one micro-batch
MANY, RECENT = 12, 1000  # and so often in as many micro-batches, however many of them came in between
# what SLURM sends to every process of a job, and is left to the one that trains; macOS has neither SLURM nor the call
LEFT = tuple(slurm.SIGNALS) if hasattr(signal, "sigwaitinfo") else ()

log = logging.getLogger(__name__)


class Span(Sampler[int]):
    """Micro-batch numbers from `start` up to `end`; its length is `end`, since Lightning counts from the beginning."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))

    def __len__(self) -> int:
        return self.end


class Outcomes(Dataset):
    """Micro-batches by number, or the error that the user can mend: raised in a worker it would lose its message."""

    def __init__(self, items: MicroBatches) -> None:
        self.items = items

    def __getitem__(self, number: int) -> Batch | UserError:
        try:
            return self.items[number]
        except UserError as error:
            return error


class Loader(DataLoader[Batch]):
    """A DataLoader that raises in this process what a worker hands over as an error, after all ranks know of it.

    Workers that die are started again at the micro-batch that is due: order and contents of all depend on their
    numbers alone, so the run goes on as if nothing had been. One that dies again and again ends the run: at the same
    micro-batch, or now and then, each time costing as much as beginning anew.
    """

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        halt.watch()
        span = self.sampler
        assert isinstance(span, Span)
        first, due = span.start, span.start
        deaths: list[int] = []  # the micro-batches that were due when workers died, of late
        outcomes: Iterator[Any] = super().__iter__()
        try:
            while True:
                try:
                    outcome = next(outcomes)
                except StopIteration:
                    return
                except (RuntimeError, OSError, EOFError) as error:  # the last two: what it had sent went with it
                    said = dead(self._iterator)
                    if said is None:
                        raise
                    deaths = [*(number for number in deaths if number > due - RECENT), due]
                    tries = deaths.count(due)
                    if tries > TRIES or len(deaths) > MANY:
                        how = f"{tries} times in a row" if tries > TRIES else f"{len(deaths)} times of late, the last"
                        outcome = DataError(
                            f"{said}, {how} at micro-batch {due}. Fewer data.workers, a smaller"
                            " data.prefetch or data.cache need less memory; the same command goes on"
                        )
                        outcome.__cause__ = error
                    else:
                        log.warning("%s; loading goes on from micro-batch %d (%d of %d tries)", said, due, tries, TRIES)
                        span.start = due
                        outcomes = self.anew()
                        continue
                if isinstance(outcome, UserError):
                    halt.announce(str(outcome))
                    raise outcome
                yield outcome
                due += 1
        finally:
            span.start = first

    def anew(self) -> Iterator[Batch]:
        """End all workers and start others."""
        old, self._iterator = self._iterator, None
        for worker in getattr(old, "_workers", []):
            worker.kill()  # it may wait for a lock that the dead one held
        if old is not None:
            old._shutdown_workers()  # type: ignore[attr-defined]
        return super().__iter__()


def dead(iterator: Any) -> str | None:
    """Return in words which worker of a loader's iterator has died of what; None where all live."""
    workers = getattr(iterator, "_workers", [])
    for _ in range(10):  # it may be dying
        for number, worker in enumerate(workers):
            code = worker.exitcode
            if code is not None:
                return f"loader process {number} of {len(workers)} (process {worker.pid}) {ended_by(code)}"
        time.sleep(0.1)
    return None


def made_by(items: Dataset, workers: int) -> Iterator[Any]:
    """Yield `items` in order, made by as many processes; for jobs, which go on where they stopped.

    Raises:
        DataError: a process died.
    """
    iterator = iter(DataLoader(items, batch_size=None, num_workers=workers))
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except (RuntimeError, OSError, EOFError) as error:
            said = dead(iterator)
            if said is None:
                raise
            raise DataError(f"{said}. Fewer stage.job.workers need less memory; the same command goes on") from error
        yield item


def serve(environment: Mapping[str, str], worker: int) -> None:
    """Live as long as the process that trains, in its environment.

    The server that forks has the environment of its own start, perhaps before credentials were set.

    Ctrl-C, which a terminal sends to every process, and the signals that SLURM sends to every process of a job, are
    left to that one: it still wants its batches. It alone may end this one by SIGTERM, as PyTorch does. And where it
    is killed, this one ends too; PyTorch looks at the parent, which is the server that forks, and that outlives it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, LEFT)
    os.environ.update(environment)
    trainer = multiprocessing.parent_process()
    assert trainer is not None and trainer.pid is not None

    def heed(trainer: int) -> None:
        while True:
            told = signal.sigwaitinfo(LEFT)
            if told.si_signo == signal.SIGTERM and told.si_pid == trainer:
                os._exit(0)

    def end() -> None:
        multiprocessing.connection.wait([trainer.sentinel])
        os._exit(1)

    threading.Thread(target=end, name="parent", daemon=True).start()
    if LEFT:
        threading.Thread(target=heed, args=(trainer.pid,), name="signals", daemon=True).start()


def start_server() -> None:
    """Start the server that workers are forked from, deaf to the signals that SLURM sends to every process of a job.

    So are its helper, and whoever it forks, until it says otherwise.
    """
    multiprocessing.set_forkserver_preload([MicroBatches.__module__])
    for start in (resource_tracker.ensure_running, forkserver.ensure_running):  # the first lets signals through again
        before = signal.pthread_sigmask(signal.SIG_BLOCK, LEFT)
        try:
            start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def make_loader(items: MicroBatches, start: int, end: int, *, workers: int, prefetch: int) -> DataLoader[Batch]:
    """Return a loader of micro-batches `start` up to `end`, in order, whatever the number of `workers`."""
    if workers:  # import once, before workers fork off
        start_server()
    return Loader(
        Outcomes(items),  # type: ignore[arg-type]
        batch_size=None,
        sampler=Span(start, end),
        num_workers=workers,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        multiprocessing_context="forkserver" if workers else None,
        worker_init_fn=partial(serve, dict(os.environ)) if workers else None,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),  # its own, or the loader would move on the global one
    )
