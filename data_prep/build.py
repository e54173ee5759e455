"""task=build: raw input to shards, over all cores, in units of work that an interruption does not lose."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import av
from rich.console import Console
from rich.progress import Progress

import soratrain
from data_prep import output, pulse, summary
from data_prep.encode import Encoding
from data_prep.live import Live
from data_prep.pack import Packed, Report, Unit, clean, pack, read_report, unit_done
from data_prep.records import SCHEMA, Source
from data_prep.report import write as write_report
from data_prep.schema import PrepConfig
from data_prep.stored import StoredUnit, stored_units
from data_prep.workers import Doing, Limits, do_unit, do_units
from soratrain.errors import DataError

STEPS = ("ingest", "render", "probe", "shots", "transcode", "pack")


def build(config: PrepConfig, console: Console) -> None:
    """Make the shards that `config` asks for, or say that they are there.

    Raises:
        ConfigError: the output was made with other settings.
        DataError: there is no usable input, or the output cannot be written.
    """
    planned = plan(config)
    units, report, identity = planned.units, planned.report, planned.identity
    state = output.claim(config.folder, identity, fresh=config.fresh)
    if state == "done":
        console.print(f"{config.folder} is complete and was made by the same command; fresh=true makes it again")
        if not (config.folder / "report.html").is_file():  # a kill came between it and the rest
            write_report(config.folder)
        return
    shards = output.stored(config.folder)
    if shards is not None:
        console.print(f"{config.folder}: only captions have changed; the media come from its own shards")
        units = stored_units(config.folder, shards, planned.sources)
    with output.held(config.folder):
        packed = make(config, console, units, report, resumed=state == "continue")
        if not packed.totals["samples"]:
            output.discard(config.folder)
            raise DataError(nothing_usable(config.input, report))
        finish(config, identity, report, packed)
    summary.show(console, config.folder, report, packed)
    console.print(f"  what was kept and what was not, as a page: {write_report(config.folder)}")


def make(config: PrepConfig, console: Console, units: Sequence[Unit], report: Report, *, resumed: bool) -> Packed:
    """Do the units that are not done yet, pack all of them and fill `report`."""
    building = config.folder / output.BUILDING
    clean(building / "units")
    pending = [number for number in range(len(units)) if not unit_done(building / "units", number)]
    if resumed:
        console.print(f"{config.folder}: continuing, {len(units) - len(pending)} of {len(units)} units were done")
    try:
        work(building / "units", units, pending, config, report)
        for number in range(len(units)):
            report.add(read_report(building / "units", number))
        shutil.rmtree(building / "shards", ignore_errors=True)
        max_bytes = config.shards.mb << 20
        numbers = range(len(units))
        with packing(len(units)) as seen:
            return pack(building / "units", numbers, building / "shards", max_bytes=max_bytes, report=report, seen=seen)
    except OSError as error:
        reason = error.strerror or error
        raise DataError(f"output={config.folder}: {reason}; the same command continues when that is mended") from error


@contextmanager
def packing(units: int) -> Iterator[Callable[[], None]]:
    """Show on a terminal how far packing is; each unit is read twice, to find near duplicates and then to pack it."""
    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("pack", total=2 * units)
        yield lambda: progress.advance(task)


@dataclass(frozen=True)
class Plan:
    """The units of work, a report that ingest has begun, what the build is, and the files of the input."""

    units: Sequence[Unit]
    report: Report
    identity: output.Identity
    sources: Sequence[Source] = ()


def plan(config: PrepConfig) -> Plan:
    """Return what is to be done."""
    encoding = Encoding(crf=config.video.crf, preset=config.video.preset, gop=config.video.gop)
    prep = {"config_hash": config.hash(), "versions": {"soratrain": soratrain.__version__, "av": av.__version__}}
    if config.input == "world":
        from data_prep.scenes import scene_units

        units = scene_units(**asdict(config.world), encoding=encoding, prep=prep)
        return Plan(units, Report(), output.Identity(config.identity(), ""))
    from data_prep.captions import Columns
    from data_prep.files import file_units
    from data_prep.ingest import files_hash, find
    from data_prep.shots import Cutting

    report = Report()
    sources, listing = find(config.input, report, config.captions, Columns(**asdict(config.captions_columns)))
    cutting = Cutting(**asdict(config.shots))
    identity = output.Identity(config.identity(), listing, files_hash(sources))
    made = file_units(sources, cutting=cutting, encoding=encoding, license=config.license, prep=prep)
    return Plan(made, report, identity, sources)


def work(folder: Path, units: Sequence[Unit], pending: Sequence[int], config: PrepConfig, begun: Report) -> None:
    """Do the pending units and show how far it is; an interruption loses only those that are under way."""
    unit, result = ("scenes", "render") if config.input == "world" else ("files", "transcode")
    with Live("build", folder, units, pending, begun=begun, steps=STEPS, result=result, unit=unit) as live:
        alone = config.processes == 1 and config.input == "world" and config.engine == "local"
        if alone or isinstance(units[0], StoredUnit):  # nothing foreign is decoded, so nothing needs watching
            for number in pending:
                live.doing([Doing(number, pulse.NOWHERE, time.monotonic())])
                do_unit(folder, number, units[number], {})
                live.done(number)
            return
        limits = Limits(**asdict(config.limits))
        if config.engine == "slurm":
            from data_prep.slurm import Array, do_units_as_jobs

            do_units_as_jobs(folder, units, pending, array=Array(**asdict(config.slurm)), limits=limits, done=live.done)
        else:
            do_units(
                folder, units, pending, processes=config.processes, limits=limits, done=live.done, doing=live.doing
            )


def finish(config: PrepConfig, identity: output.Identity, report: Report, packed: Packed) -> None:
    """Write failures.jsonl, stats.json and dataset.json beside the shards and publish all of it."""
    shards = config.folder / output.BUILDING / "shards"
    output.write_lines(shards / "failures.jsonl", [asdict(failure) for failure in report.failures])
    funnel = [report.tallies[step].as_dict() for step in STEPS if step in report.tallies]
    seconds = {"in": round(report.seconds, 6), "out": packed.totals["seconds"]}
    stats = {"schema": SCHEMA, "funnel": funnel, "seconds": seconds}
    stats |= {"captions": report.captions.as_dict()} if report.captions else {}
    output.write_json(shards / "stats.json", stats)
    output.publish(config.folder, output.described(identity, packed))


def nothing_usable(where: str, report: Report) -> str:
    """Return one line that says why none of the input could be used."""
    reasons = Counter(failure.reason for failure in report.failures)
    if len(report.failures) == 1:
        return f"input={where}: nothing could be used: {report.failures[0].uri}: {report.failures[0].reason}"
    listed = "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(4))
    return f"input={where}: none of {len(report.failures)} files could be used: {listed}"
