"""Work of which ranks have unlike amounts: who has done his waits for the others no longer than a round at a time.

So it may take longer than a rank waits for another, as long as it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from soratrain.distributed.checkpoint import gather

ROUND = 10.0  # seconds between two meetings


class Rounds:
    """Of one piece of work, which every rank ends with `end`, whether it has done its part or failed.

    Args:
        group: of the ranks that meet.
        moved: called whenever this rank, or another, has come further.
    """

    def __init__(self, group: Any, moved: Callable[[], None]) -> None:
        self.group, self.moved, self.last = group, moved, time.monotonic()

    def go_on(self) -> None:
        """Say that this rank has done a little more; it meets the others where a round is over."""
        self.moved()
        if time.monotonic() - self.last >= ROUND:
            self.meet(False)

    def end(self) -> None:
        """Wait until all ranks have done their part."""
        while not self.meet(True):
            self.moved()

    def meet(self, done: bool) -> bool:
        """Return whether all ranks have done their part; collective."""
        answers = gather(done, self.group)
        self.last = time.monotonic()
        return all(answers)
