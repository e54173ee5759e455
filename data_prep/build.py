"""task=build: raw input to shards, over all cores, in units of work that an interruption does not lose."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import av
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

import soratrain
from data_prep import output, summary
from data_prep.encode import Encoding
from data_prep.pack import Packed, Report, clean, pack, read_report, unit_done, write_unit
from data_prep.records import SCHEMA, Sample
from data_prep.schema import PrepConfig
from soratrain.errors import DataError

STEPS = ("ingest", "render", "probe", "shots", "transcode", "pack")
QUEUE = 4  # units handed out ahead of each process


class Unit(Protocol):
    """Some of the input, which one process turns into samples; the same each time."""

    @property
    def size(self) -> int:
        """How many files or scenes it is made of."""

    def samples(self, report: Report) -> Iterator[Sample]:
        """Yield its samples and count in `report` what entered and left each step."""


def build(config: PrepConfig, console: Console) -> None:
    """Make the shards that `config` asks for, or say that they are there.

    Raises:
        ConfigError: the output was made with other settings.
        DataError: there is no usable input, or the output cannot be written.
    """
    units, report, listing = plan(config)
    identity = output.Identity(config.identity(), listing)
    state = output.claim(config.folder, identity, fresh=config.fresh)
    if state == "done":
        console.print(f"{config.folder} is complete and was made by the same command; fresh=true makes it again")
        return
    with output.held(config.folder):
        packed = make(config, console, units, report, resumed=state == "continue")
        if not packed.totals["samples"]:
            output.discard(config.folder)
            raise DataError(nothing_usable(config.input, report))
        finish(config, identity, report, packed)
    summary.show(console, config.folder, report, packed)


def make(config: PrepConfig, console: Console, units: Sequence[Unit], report: Report, *, resumed: bool) -> Packed:
    """Do the units that are not done yet, pack all of them and fill `report`."""
    building = config.folder / output.BUILDING
    clean(building / "units")
    pending = [number for number in range(len(units)) if not unit_done(building / "units", number)]
    if resumed:
        console.print(f"{config.folder}: continuing, {len(units) - len(pending)} of {len(units)} units were done")
    try:
        work(building / "units", units, pending, config.processes)
        for number in range(len(units)):
            report.add(read_report(building / "units", number))
        shutil.rmtree(building / "shards", ignore_errors=True)
        max_bytes = config.shards.mb << 20
        return pack(building / "units", range(len(units)), building / "shards", max_bytes=max_bytes, report=report)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"output={config.folder}: {reason}; the same command continues when that is mended") from error


def plan(config: PrepConfig) -> tuple[Sequence[Unit], Report, str]:
    """Return the units of work, a report that ingest has begun, and a hash of what the input holds."""
    encoding = Encoding(crf=config.video.crf, preset=config.video.preset, gop=config.video.gop)
    prep = {"config_hash": config.hash(), "versions": {"soratrain": soratrain.__version__, "av": av.__version__}}
    if config.input == "world":
        from data_prep.scenes import scene_units

        return scene_units(**asdict(config.world), encoding=encoding, prep=prep), Report(), ""
    from data_prep.files import file_units
    from data_prep.ingest import find
    from data_prep.shots import Cutting

    report = Report()
    sources, listing = find(config.input, report)
    cutting = Cutting(**asdict(config.shots))
    return file_units(sources, cutting=cutting, encoding=encoding, license=config.license, prep=prep), report, listing


def work(folder: Path, units: Sequence[Unit], pending: Sequence[int], processes: int) -> None:
    """Do the pending units with a progress bar; an interruption loses only those that are under way."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        done = sum(unit.size for number, unit in enumerate(units) if number not in set(pending))
        task = progress.add_task("data_prep", total=sum(unit.size for unit in units), completed=done)
        if processes == 1 or len(pending) < 2:
            for number in pending:
                do_unit(folder, number, units[number])
                progress.advance(task, units[number].size)
            return
        context = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(min(processes, len(pending)), mp_context=context, initializer=prepare_worker)
        try:
            waiting: dict[Future[None], int] = {}
            queue = iter(pending)
            while True:
                for number in queue:
                    waiting[pool.submit(do_unit, folder, number, units[number])] = number
                    if len(waiting) >= processes * QUEUE:
                        break
                if not waiting:
                    break
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    number = waiting.pop(future)
                    future.result()
                    progress.advance(task, units[number].size)
        except BrokenProcessPool as error:
            raise DataError("a worker process died (out of memory?); the same command continues") from error
        except KeyboardInterrupt:
            for process in multiprocessing.active_children():  # what they are at is done again
                process.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)


def do_unit(folder: Path, number: int, unit: Unit) -> None:
    """Do one unit and leave its result in `folder`."""
    report = Report()
    write_unit(folder, number, unit.samples(report), report)


def prepare_worker() -> None:
    """Let Ctrl-C reach only the process that waits, which ends the others; let none outlive it, whatever ends it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def finish(config: PrepConfig, identity: output.Identity, report: Report, packed: Packed) -> None:
    """Write failures.jsonl, stats.json and dataset.json beside the shards and publish all of it."""
    shards = config.folder / output.BUILDING / "shards"
    output.write_lines(shards / "failures.jsonl", [asdict(failure) for failure in report.failures])
    funnel = [report.tallies[step].as_dict() for step in STEPS if step in report.tallies]
    seconds = {"in": round(report.seconds, 6), "out": packed.totals["seconds"]}
    output.write_json(shards / "stats.json", {"schema": SCHEMA, "funnel": funnel, "seconds": seconds})
    output.publish(config.folder, output.described(identity, packed))


def nothing_usable(where: str, report: Report) -> str:
    """Return one line that says why none of the input could be used."""
    reasons = Counter(failure.reason for failure in report.failures)
    if len(report.failures) == 1:
        return f"input={where}: nothing could be used: {report.failures[0].uri}: {report.failures[0].reason}"
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(4))
    return f"input={where}: none of {len(report.failures)} files could be used: {listed}"
