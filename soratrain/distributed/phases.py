"""What a rank is at: its phase, since when, and how far it has come. Lightning tells it, as it would a profiler.

Being told costs about a microsecond; the rest is worked out by who asks.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lightning.pytorch.profilers import Profiler

FETCH = "train_dataloader_next"
# what Lightning calls an action, by how its name ends or what it holds, and what we call it; the innermost counts
NAMES = (
    (FETCH, "data"),
    ("batch_to_device", "data"),
    ("training_step", "forward/backward"),
    ("backward", "forward/backward"),
    ("optimizer_step", "optimizer"),
    ("save_checkpoint", "checkpoint"),
    ("[Callback]Checkpoint", "checkpoint"),
    ("[Callback]Validation", "validation"),
    ("[Callback]Previews", "samples"),
    ("[Callback]Export", "export"),
)
BETWEEN, OUTSIDE = "between steps", "beginning or end"
LONG = ("checkpoint", "validation", "samples", "export", OUTSIDE)  # may take long


@dataclass(frozen=True)
class Standing:
    """Where a rank is.

    Attributes:
        phase: what it is at.
        step: the optimizer step that it works on, counted from 1.
        moves: how much it has begun, ended or come further with; ranks do the same, so the one with least is behind.
        quiet: seconds since the last of that, or of its own pieces.
        free: whether it may take long: in a long phase, or in its first step, which may compile.
        pieces: of work that only this rank has, or of which it has more or less than others: shows that it moves.
    """

    phase: str
    step: int
    moves: int
    quiet: float
    free: bool
    pieces: int = 0


class Phases(Profiler):
    """Follows one process.

    Attributes:
        waited: seconds that its steps have waited for the loader.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stack: list[tuple[str, float]] = []
        self.moves, self.pieces, self.since, self.waited = 0, 0, time.monotonic(), 0.0
        self.count: Callable[[], int] = lambda: 0  # of finished optimizer steps
        self.first = 0

    def follow(self, count: Callable[[], int]) -> None:
        """Take the number of finished optimizer steps from `count`, from now on."""
        self.count, self.first = count, count()
        self.since = time.monotonic()

    def start(self, action_name: str) -> None:
        self.since = time.monotonic()
        self.moves += 1
        self.stack.append((action_name, self.since))

    def stop(self, action_name: str) -> None:
        now = self.since = time.monotonic()
        self.moves += 1
        if self.stack:
            name, began = self.stack.pop()
            if name.endswith(FETCH):
                self.waited += now - began

    def move(self, *, alike: bool = True) -> None:
        """Say that what takes long, and is one action to Lightning, has come further.

        Args:
            alike: whether all ranks say so equally often.
        """
        self.since = time.monotonic()
        if alike:
            self.moves += 1
        else:
            self.pieces += 1

    def standing(self) -> Standing:
        """Return where this process is; for another thread."""
        names, since, done = [name for name, _ in self.stack], self.since, self.count()
        phase = next((called for name in reversed(names) for part, called in NAMES if part in name), None)
        phase = phase or (BETWEEN if "run_training_epoch" in names else OUTSIDE)
        free = phase in LONG or done <= self.first
        return Standing(phase, done + 1, self.moves, time.monotonic() - since, free, self.pieces)
