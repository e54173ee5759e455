"""How a long job tells what is to come: its size before it begins, its speed and its end after the first batches."""

from __future__ import annotations

import math
import time

from rich import get_console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from soratrain.callbacks.progress import duration

ENOUGH = 2.0  # seconds of measuring, or less where half the work is done
EVERY = 15.0  # seconds between two lines where there is no terminal, and so no bar


class Pace:
    """Tells how fast the work goes and when it will end, from the batches after the first, which warms up.

    Once as soon as it is known; where there is no terminal to show a bar, now and then from then on.

    Args:
        clips, pixels: of this rank's work.
        ranks: how many work as much beside it.
        every: seconds between two sentences; by default none follows the first on a terminal.
    """

    def __init__(self, clips: int, pixels: int, ranks: int = 1, *, every: float | None = None) -> None:
        self.clips, self.pixels, self.ranks = clips, pixels, ranks
        self.every = every if every is not None else math.inf if get_console().is_terminal else EVERY
        self.began: float | None = None
        self.said: float | None = None
        self.done = self.measured = self.clips_done = 0

    def step(self, pixels: int, clips: int) -> str | None:
        """Count a batch; return a sentence when enough is known, or when it is time for another."""
        now = time.monotonic()
        self.done += pixels
        self.clips_done += clips
        if self.began is None:
            self.began = now
            return None
        self.measured += pixels
        first = self.said is None
        early = now - self.began < ENOUGH and self.done < self.pixels / 2
        soon = self.said is not None and (now - self.said < self.every or self.clips_done >= self.clips)
        if soon or (first and early) or not self.measured:
            return None
        self.said = now
        speed = self.measured / max(now - self.began, 1e-6)
        left = max(self.pixels - self.done, 0) / speed
        rate = self.ranks * speed * self.clips / self.pixels
        whose = f" of rank 0 of {self.ranks}" if self.ranks > 1 else ""
        far = f"{self.clips_done:,}/{self.clips:,} clips{whose}, {100 * self.clips_done // self.clips} %; "
        return f"{'' if first else far}about {duration(left)} more at {rate:.3g} clips/s"

    def skip(self, pixels: int, clips: int) -> None:
        """Count what had been done before, which says nothing of the speed."""
        self.done += pixels
        self.clips_done += clips


def in_bytes(count: float) -> str:
    """Return a number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count:.0f} bytes"
        count /= 1000
    return f"{count:,.3g} TB"


def progress(*, shown: bool = True) -> Progress:
    """Return a progress bar with time left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    return Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), disable=not shown)
