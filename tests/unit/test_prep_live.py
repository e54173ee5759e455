"""Promises of what a run shows while it is at work."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from prep_clips import moving, write
from rich.cells import cell_len
from rich.console import Console

from data_prep import pulse
from data_prep.__main__ import main
from data_prep.columns import end_cut, middle_cut, printable
from data_prep.live import Live
from data_prep.pack import Report, write_unit
from data_prep.records import Failure, Sample
from data_prep.workers import Doing

ODD = "[red]三只猫[/] :smile: \x1b[31m\nnew 👩\u200d👩\u200d👧 ❤\ufe0f " + "long " * 30 + "end.mp4"


@dataclass(frozen=True)
class Unit:
    """Two files, one of which fails."""

    size: int = 2

    def name(self, file: int) -> str:
        return "" if file == pulse.NOWHERE else f"{file}{ODD}"

    def samples(self, report: Report, skips: Mapping[int, str] | None = None) -> Iterator[Sample]:
        probe = report.tally("probe", "files")
        probe.entered, probe.left = 2, 1
        probe.dropped[f"bad {ODD}"] += 1
        report.failures.append(Failure("x", "probe", "bad"))
        report.tally("transcode", "clips").entered = report.tally("transcode", "clips").left = 3
        report.seconds = 6.0
        yield from ()


def live(folder: Path, units: int, pending: list[int], **more: object) -> Live:
    for number in range(units):
        report = Report()
        write_unit(folder, number, Unit().samples(report), report)
    how = {"begun": Report(), "steps": ("ingest", "probe", "transcode"), "result": "transcode", "unit": "files"}
    return Live("build", folder, [Unit()] * units, pending, **(how | more))  # type: ignore[arg-type]


def terminal(width: int, height: int = 30) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=height, highlight=False, markup=False)


@pytest.mark.parametrize("width", [8, 40, 60, 80, 200])
def test_every_line_fits_whatever_names_and_reasons_hold(tmp_path: Path, width: int) -> None:
    console = Console(file=io.StringIO(), width=width, height=30, highlight=False, markup=False)
    display = live(tmp_path, 3, [1, 2], console=console)
    display.doing([Doing(1, 0, time.monotonic() - 61), Doing(2, 1, time.monotonic()), Doing(2, pulse.NOWHERE, 0.0)])
    with console.capture() as capture:
        console.print(display.render())
    lines = capture.get().splitlines()
    assert all(cell_len(line) <= width for line in lines) and "\x1b" not in capture.get()
    if width >= 80:
        assert "2/6 files" in lines[0] and lines[0].startswith("build")
        assert "2 files in" in lines[1] and "1 out" in lines[1] and "dropped 1: bad [red]三只猫" in lines[1]
        assert lines[2].split()[:5] == ["transcode", "3", "clips", "in", "3"]
        assert "1 failure" in lines[3]
        assert lines[4].startswith("  0:01:01  0[red]三只猫[/]") and lines[4].rstrip().endswith("end.mp4")
        assert len(lines) == 6


def test_what_was_done_before_counts_in_figures_and_not_in_speeds(tmp_path: Path) -> None:
    display = live(tmp_path, 4, [2, 3])
    display.began = time.monotonic() - 10
    assert (display.made, display.results, display.failures, display.left) == (4, 6, 2, "-:--:--")
    assert display.rates()[:2] == ["0 clips/s", "0 s of video/s"]
    display.done(2)
    assert display.rates()[:2] == ["0.3 clips/s", "0.6 s of video/s"] and display.left == "0:00:10"
    assert display.bytes == 3 * (tmp_path / "000000.tar").stat().st_size


def test_the_commonest_reasons_are_named_and_the_rest_summed(tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=100)
    begun = Report()
    begun.tally("ingest", "files").dropped.update({"rare": 1, "common": 9, "often": 5, "seldom": 2})
    with console.capture() as capture:
        console.print(live(tmp_path, 1, [0], begun=begun, console=console).render())
    assert [line.split("out")[-1].strip() for line in capture.get().splitlines()[1:4]] == [
        "dropped 9: common",
        "dropped 5: often",
        "dropped 3 for other reasons",
    ]


def test_without_a_terminal_it_is_a_plain_line_now_and_then(tmp_path: Path) -> None:
    file = io.StringIO()
    with live(tmp_path, 2, [1], console=Console(file=file, width=80), every=0.05) as display:
        display.doing([Doing(1, 0, time.monotonic() - 61)])
        time.sleep(0.18)
        display.done(1)
    lines = file.getvalue().splitlines()
    assert 3 <= len(lines) <= 5 and "\x1b" not in file.getvalue()
    assert lines[0].startswith("build 2/4 files, 0:00:00, left -:--:--; 0 clips/s, 0 s of video/s, ")
    assert "probe 2 in, 1 out; transcode 3 in, 3 out; dropped 1: bad [red]三只猫" in lines[0]
    assert "; at 0[red]三只猫" in lines[0] and lines[0].endswith("for 0:01:01")
    assert lines[-1].startswith("build 4/4 files, 0:00:00; ") and "left" not in lines[-1]


def test_a_short_run_without_a_terminal_says_nothing(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "a.mp4", moving(8))
    assert main([f"input={tmp_path / 'a.mp4'}", f"output={tmp_path / 'out'}", "workers=1"]) == 0
    assert capfd.readouterr().err == ""


def test_a_display_is_gone_when_it_ends_but_for_one_line(tmp_path: Path) -> None:
    console = terminal(80)
    with live(tmp_path, 2, [1], console=console) as display:
        display.done(1)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    height = text.rpartition("\x1b[?25h")[0].rpartition("build")[2].count("\n")  # of what was drawn last
    _, _, after = text.rpartition("\x1b[?25h")
    assert after.count("\x1b[1A\x1b[2K") == height >= 4
    assert after.rpartition("\x1b[2K")[2].startswith("build 4/4 files, 0:00:00; ") and after.endswith("failures\n")


def test_a_name_that_is_too_long_keeps_its_ends() -> None:
    assert middle_cut("abcdefghij", 7) == "abc…hij" and middle_cut("abc", 7) == "abc"
    for width in range(1, 30):
        for cut in (middle_cut(printable(ODD), width), end_cut(printable(ODD), width)):
            assert cell_len(cut) <= width and "…" in cut
