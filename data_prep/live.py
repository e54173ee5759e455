"""What a run of data_prep shows while it is at work: how far it is, the funnel as it grows, and who is at what.

On a terminal this is a display that stays in place; elsewhere (a log file, CI) the same figures are a line every so
often. They come from the reports of finished units, so what an earlier run has finished counts too, but in no speed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.live import Live as Display
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from data_prep.columns import end_cut, middle_cut, printable
from data_prep.pack import Report, Unit, read_report
from data_prep.records import Tally
from data_prep.workers import Doing
from soratrain.amounts import counted, duration, short, size

PER_SECOND = 4  # times the display is drawn
EVERY = 30.0  # seconds between two lines where there is no terminal
REASONS = 2  # shown of each step, the commonest
WORKERS = 8  # shown, those that are longest at one file
SPARE = 3  # columns: terminals write ^C behind the last line, and think some characters wider than we do
NARROW = 60  # columns below which the bar does without words


class Live:
    """Shows the units of work that are done and to do, while it is entered.

    Args:
        task: what is being done.
        folder: where finished units are.
        units: all of them; those that are not `pending` are done already.
        begun: what was counted before any unit.
        steps: of the funnel, in order.
        result: the step whose samples are counted for the speed.
        unit: what units are made of.
        bytes_of: bytes of unit number n when it is done; by default what it has written.
        verb: what became of those bytes.
        console: where to show it; by default the terminal's stderr.
        every: seconds between two lines where there is no terminal.
    """

    def __init__(
        self,
        task: str,
        folder: Path,
        units: Sequence[Unit],
        pending: Sequence[int],
        *,
        begun: Report,
        steps: Sequence[str],
        result: str,
        unit: str,
        bytes_of: Callable[[int], int] | None = None,
        verb: str = "written",
        console: Console | None = None,
        every: float = EVERY,
    ) -> None:
        self.task, self.folder, self.units, self.steps, self.unit = task, folder, units, steps, unit
        self.result = result
        self.bytes_of = bytes_of or (lambda number: (folder / f"{number:06d}.tar").stat().st_size)
        self.verb, self.every = verb, every
        self.console = console or Console(stderr=True, highlight=False, markup=False, emoji=False)
        self.total = sum(item.size for item in units)
        self.made, self.bytes, self.seconds, self.failures = 0, 0, 0.0, len(begun.failures)
        self.report = Report()  # of which only the tallies grow: failures may be millions
        self.report.add(Report(begun.tallies))
        self.workers: list[Doing] = []
        self._lock = threading.RLock()  # the figures change while another thread draws them
        self._display: Display | None = None
        self._over = threading.Event()
        self._lines = 0
        left = set(pending)
        for number in range(len(units)):
            if number not in left:
                self.done(number)
        self.began, self.before = time.monotonic(), (self.made, self.results, self.seconds)

    def __enter__(self) -> Self:
        self.began = time.monotonic()
        if self.console.is_terminal:
            self._display = Display(
                get_renderable=self.render,
                console=self.console,
                refresh_per_second=PER_SECOND,
                transient=True,
                redirect_stdout=False,
            )
            self._display.start(refresh=True)
        else:
            threading.Thread(target=self._say, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._over.set()
        if self._display is not None:
            self._display.stop()
        if self._display is not None or (kind is None and self._lines):
            self.console.print(Text("; ".join(self._far())), soft_wrap=True)

    def done(self, number: int) -> None:
        """Count unit `number`, which is finished."""
        found = read_report(self.folder, number)
        with self._lock:
            self.report.add(Report(found.tallies))
            self.failures += len(found.failures)
            self.seconds += found.seconds
            self.bytes += self.bytes_of(number)
            self.made += self.units[number].size

    def doing(self, workers: list[Doing]) -> None:
        """Take what the workers are at now."""
        self.workers = workers

    @property
    def tallies(self) -> list[Tally]:
        """The funnel, in the order of its steps."""
        return [self.report.tallies[step] for step in self.steps if step in self.report.tallies]

    @property
    def results(self) -> int:
        """How many samples there are so far."""
        return self.report.tallies[self.result].left if self.result in self.report.tallies else 0

    @property
    def elapsed(self) -> float:
        """Seconds since this run began."""
        return time.monotonic() - self.began

    @property
    def left(self) -> str:
        """The time that the rest will take at the speed of this run; unknown before the first unit is done."""
        made = self.made - self.before[0]
        return duration(self.elapsed / made * (self.total - self.made)) if made else "-:--:--"

    def rates(self) -> list[str]:
        """Return speeds, bytes and failures so far."""
        seconds = max(self.elapsed, 1e-3)
        what = self.report.tallies[self.result].unit if self.result in self.report.tallies else "clips"
        return [
            f"{short((self.results - self.before[1]) / seconds)} {what}/s",
            f"{short((self.seconds - self.before[2]) / seconds)} s of video/s",
            f"{size(self.bytes)} {self.verb}",
            f"{self.failures:,} failure{'' if self.failures == 1 else 's'}",
        ]

    def at(self) -> list[tuple[str, float]]:
        """Return the names of the files that are at work, those longest at it first, and for how many seconds."""
        now = time.monotonic()
        named = [(printable(self.units[one.number].name(one.file)), now - one.since) for one in self.workers]
        return sorted((item for item in named if item[0]), key=lambda item: -item[1])

    def line(self) -> str:
        """Return all of it as one line."""
        funnel = [f"{tally.step} {tally.entered:,} in, {tally.left:,} out" for tally in self.tallies]
        why = [f"dropped {count:,}: {printable(reason)}" for tally in self.tallies for reason, count in top(tally)[0]]
        at = [f"at {name} for {duration(seconds)}" for name, seconds in self.at()[:1]]
        return "; ".join([*self._far(), *funnel, *why, *at])

    def _far(self) -> list[str]:
        """Return how far it is, and the speeds."""
        left = f", left {self.left}" if self.made < self.total else ""
        return [
            f"{self.task} {self.made:,}/{self.total:,} {self.unit}, {duration(self.elapsed)}{left}",
            ", ".join(self.rates()),
        ]

    def render(self) -> RenderableType:
        """Return the display."""
        with self._lock:
            width = max(self.console.width - SPARE, 1)
            below = [self._funnel(width), self._rates(width), self._workers(width)]
            return Group(self._bar(width), *filter(None, below))

    def _bar(self, width: int) -> Table:
        grid = Table.grid(padding=(0, 2), expand=True)
        counts = f"{self.made:,}/{self.total:,}"
        words = [counts, duration(self.elapsed), self.left]
        if width >= NARROW:
            words = [f"{counts} {self.unit}", duration(self.elapsed), f"left {self.left}"]
            grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        for _ in words:
            grid.add_column(no_wrap=True)
        bar = ProgressBar(total=max(self.total, 1), completed=self.made)
        grid.add_row(*([Text(self.task)] if width >= NARROW else []), bar, *map(Text, words))
        return grid

    def _funnel(self, width: int) -> Text:
        rows: list[tuple[str, str, str, str]] = []
        for tally in self.tallies:
            reasons, others = top(tally)
            notes = [f"dropped {count:,}: {printable(reason)}" for reason, count in reasons]
            notes += [f"dropped {others:,} for other reasons"] if others else []
            numbers = (f"  {tally.step}", f"{counted(tally.entered, tally.unit)} in", f"{tally.left:,} out")
            rows += [(*numbers, "".join(notes[:1])), *(("", "", "", note) for note in notes[1:])]
        one, two, three = (max((cell_len(row[place]) for row in rows), default=0) for place in range(3))
        text = Text(no_wrap=True, overflow="ellipsis")
        for name, entered, out, note in rows:
            text.append(f"{name:<{one}}  {entered:>{two}}  {out:>{three}}")
            text.append(f"  {end_cut(note, max(width - one - two - three - 6, 0))}\n", style="dim")
        text.rstrip()
        return text

    def _rates(self, width: int) -> Text:
        lines = [""]
        for rate in self.rates():
            more = f"{lines[-1]} · {rate}" if lines[-1] else f"  {rate}"
            lines[-1:] = [more] if cell_len(more) <= width else [lines[-1], f"  {rate}"]
        return Text("\n".join(lines), no_wrap=True)

    def _workers(self, width: int) -> Text:
        at = self.at()
        lines = []
        for name, seconds in at[:WORKERS]:
            start = f"  {duration(seconds)}  "
            lines.append(start + middle_cut(name, max(width - len(start), 1)))
        lines += [f"  and {len(at) - WORKERS} more"] if len(at) > WORKERS else []
        return Text("\n".join(lines), no_wrap=True, style="cyan")

    def _say(self) -> None:
        """Print a line now and then."""
        while not self._over.wait(self.every):
            with self._lock:
                self._lines += 1
                self.console.print(Text(self.line()), soft_wrap=True)


def top(tally: Tally) -> tuple[list[tuple[str, int]], int]:
    """Return the commonest reasons of what a step dropped, and how many were dropped for others."""
    shown = tally.dropped.most_common(REASONS)
    return shown, tally.dropped.total() - sum(count for _, count in shown)
