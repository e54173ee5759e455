"""Promises about files that hang, explode or crash what decodes them: each costs itself, and nothing else."""

from __future__ import annotations

import json
import os
import resource
import signal
import struct
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prep_clips import PREP, moving, prepared, write

from data_prep.encode import Encoding
from data_prep.files import FileUnit, FileWork
from data_prep.pack import read_report, read_samples, unit_done
from data_prep.records import Sample, Source
from data_prep.shots import Cutting
from data_prep.workers import Limits, do_units
from soratrain.errors import DataError


@dataclass(frozen=True)
class TrappedUnit(FileUnit):
    """Files of which some do, by their names, what a broken decoder does."""

    def of(self, work: FileWork) -> Iterator[Sample]:
        hoard = []
        match work.source.path.stem:
            case "hang":
                time.sleep(1000)
            case "explode":
                while True:
                    hoard.append(b"\xff" * (64 << 20))
                    time.sleep(0.02)
            case "crash":
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                os.kill(os.getpid(), signal.SIGSEGV)
            case "full":
                raise OSError(28, "No space left on device")
        yield from super().of(work)


class Nowhere(TrappedUnit):
    def samples(self, report: object, skips: object = None) -> Iterator[Sample]:
        os._exit(3)
        yield


def unit(folder: Path, *names: str, kind: type[FileUnit] = TrappedUnit) -> FileUnit:
    sources = [Source(name, write(folder / name, moving(8, seed=at)), "video") for at, name in enumerate(names)]
    return kind(tuple(sources), Cutting(), Encoding(), "", PREP)


def write_bomb(path: Path, side: int) -> None:
    """Write a small black PNG of one bit a pixel and a palette, large once unpacked (ISO/IEC 15948)."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 3, 0, 0, 0)) + chunk(b"PLTE", bytes(6))
    rows = zlib.compress(bytes((1 + -(-side // 8)) * side), 1)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def work(folder: Path, units: list[FileUnit], *, processes: int = 2, **limits: float) -> list[int]:
    ended: list[int] = []
    folder.mkdir(exist_ok=True)
    pending = [number for number in range(len(units)) if not unit_done(folder, number)]
    do_units(folder, units, pending, processes=processes, limits=Limits(**limits), done=ended.append)
    return ended


@pytest.mark.full
@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_that_brings_its_process_down_costs_itself_alone(tmp_path: Path, processes: int) -> None:
    names = ("hang.mp4", "explode.mp4", "crash.mp4")
    units = [unit(tmp_path, "a.mp4", names[0], "b.mp4"), unit(tmp_path, "c.mp4"), unit(tmp_path, *names[1:], "d.mp4")]
    assert sorted(work(tmp_path / "units", units, processes=processes, seconds=6, memory_gb=0.6)) == [0, 1, 2]
    kept = [record["source"]["uri"] for number in range(3) for _, record, _ in read_samples(tmp_path / "units", number)]
    assert kept == ["a.mp4", "b.mp4", "c.mp4", "d.mp4"]
    reports = [read_report(tmp_path / "units", number) for number in range(3)]
    reasons = {failure.uri: failure.reason for report in reports for failure in report.failures}
    assert reasons == {
        "hang.mp4": "decoding it stalled for more than limits.seconds=6",
        "explode.mp4": "decoding it took more than limits.memory_gb=0.6",
        "crash.mp4": "the decoder crashed (signal 11)",
    }
    for report in reports:
        probed = report.tallies["probe"]
        assert probed.entered - probed.left == probed.dropped.total()


def test_what_brought_a_process_down_is_not_touched_again(tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "000000.skip.json").write_text(json.dumps({0: "it hung"}))
    began = time.monotonic()
    work(tmp_path / "units", [unit(tmp_path, "hang.mp4", "a.mp4")], seconds=30)
    assert time.monotonic() - began < 20
    (failure,) = read_report(tmp_path / "units", 0).failures
    assert (failure.uri, failure.reason) == ("hang.mp4", "it hung")


def test_an_image_that_unpacks_to_more_than_the_limit_costs_itself_alone(tmp_path: Path) -> None:
    write_bomb(tmp_path / "bomb.png", 15_000)
    assert (tmp_path / "bomb.png").stat().st_size < 1 << 20
    sources = (Source("bomb.png", tmp_path / "bomb.png", "image"), *unit(tmp_path, "a.mp4").sources)
    work(tmp_path / "units", [FileUnit(sources, Cutting(), Encoding(), "", PREP)], processes=1, memory_gb=0.5)
    kept = [record["source"]["uri"] for _, record, _ in read_samples(tmp_path / "units", 0)]
    (failure,) = read_report(tmp_path / "units", 0).failures
    assert kept == ["a.mp4"] and failure.uri == "bomb.png"
    assert "memory_gb=0.5" in failure.reason or "memory" in failure.reason.lower()


def test_an_error_that_is_no_files_fault_ends_the_run_with_its_own_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device"):
        work(tmp_path / "units", [unit(tmp_path, "a.mp4", "full.mp4")])
    with pytest.raises(DataError, match="died outside any file .the decoder crashed .exit code 3"):
        work(tmp_path / "other", [unit(tmp_path, "a.mp4", kind=Nowhere)])


def test_a_pipe_that_is_called_a_video_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "stream.mp4")
    samples, report = prepared(tmp_path / "stream.mp4")
    assert samples == [] and [failure.reason for failure in report.failures] == [
        "is not a file but a pipe, a socket or a device"
    ]
