"""How a long job tells what is to come: its size before it begins, its speed and its end after the first batches."""

from __future__ import annotations

import time

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from soratrain.callbacks.progress import duration

ENOUGH = 2.0  # seconds of measuring, or less where half the work is done


class Pace:
    """Tells once how fast the work goes and when it will end, from the batches after the first, which warms up.

    Args:
        clips, pixels: of this rank's work.
        ranks: how many work as much beside it.
    """

    def __init__(self, clips: int, pixels: int, ranks: int = 1) -> None:
        self.clips, self.pixels, self.ranks = clips, pixels, ranks
        self.began: float | None = None
        self.done = self.measured = 0
        self.told = False

    def step(self, pixels: int) -> str | None:
        """Count a batch; return a sentence when enough is known."""
        now = time.monotonic()
        self.done += pixels
        if self.began is None:
            self.began = now
            return None
        self.measured += pixels
        early = now - self.began < ENOUGH and self.done < self.pixels / 2
        if self.told or early or not self.measured:
            return None
        self.told = True
        speed = self.measured / max(now - self.began, 1e-6)
        left = max(self.pixels - self.done, 0) / speed
        rate = self.ranks * speed * self.clips / self.pixels
        return f"about {duration(left)} more at {rate:.3g} clips/s"


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
