"""Notices that a run stands still, says which rank is behind, and ends all of it.

Each rank's thread leaves in the store where the rank stands (`Phases`). Ranks 0 and 1 read what all have left. When
none has moved for so long, the rank that has done least is the one that the others wait for; one whose thread is
silent too is stopped, or its node is gone. What may take long (a first step, a checkpoint, a validation, an export) has
a limit of its own, for which it may stand still; as long as it goes on it may take any time. Beside that each rank
looks whether the next one on its node still runs, and whether the store answers, which one rank holds.

Alone, a process is only told that it stands still, and where: nothing waits for it.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from soratrain.distributed import halt
from soratrain.distributed.neighbours import GONE, STOPPED, Card
from soratrain.distributed.phases import Phases, Standing

log = logging.getLogger(__name__)

PLACE = "soratrain/watch"
BEAT = 5.0  # seconds between two signs of life, fewer where stalls are to be found sooner
MEETING = timedelta(seconds=30)  # for which a rank waits at the beginning for the cards of others
GONE_FOR = 3.0  # seconds for whoever started a process to say how it ended
PARTING = 120.0  # seconds for which the rank that holds the store waits for the others at the end


@dataclass
class Seen:
    """What is known of a rank.

    Attributes:
        standing: what it said last.
        beat: the number that this came with.
        heard: when it last said anything.
        moved: when it last said that it had moved.
    """

    standing: Standing
    beat: float
    heard: float
    moved: float


def verdict(ranks: Sequence[Seen], now: float, limit: float, long: float) -> tuple[str, list[int]] | None:
    """Return why the run has stalled and the ranks that are behind; None where it has not.

    Args:
        limit: seconds.
        long: seconds that it may take where one of the ranks is at what may take long.
    """
    silent = [rank for rank, seen in enumerate(ranks) if now - seen.heard >= (long if seen.standing.free else limit)]
    if silent:
        first = ranks[silent[0]].standing
        return (
            f"rank {silent[0]} has shown no sign of life for {now - ranks[silent[0]].heard:.0f} s, since step"
            f" {first.step} ({first.phase}): it is stopped, or its node is gone or cut off"
        ), silent
    free = any(seen.standing.free for seen in ranks)
    if not ranks or any(now - seen.moved < (long if free else limit) for seen in ranks):
        return None
    least = min(seen.standing.moves for seen in ranks)
    behind = [rank for rank, seen in enumerate(ranks) if seen.standing.moves == least]
    first = ranks[behind[0]].standing
    still = f"no step has ended for {now - max(seen.moved for seen in ranks):.0f} s"
    mend = "; if it may take longer, give a larger strategy.timeout_minutes" if free else ""
    if len(behind) == len(ranks):
        where = f"all ranks stand at step {first.step} ({first.phase}){mend}"
        return f"{still}: {where}; is the network between them up?", behind
    who = f"rank {behind[0]} is" if len(behind) == 1 else f"ranks {', '.join(map(str, behind[:8]))} are"
    return f"{still}: {who} behind, at step {first.step} ({first.phase}), and the others wait{mend}", behind


class Watchdog:
    """Watches one run, from `begin` to `part`.

    Args:
        phases: of this process.
        limit: seconds without a move after which a run has stalled.
        long: the same of what may take long.
        local, locals: this process's number on its node, and how many it has.
    """

    def __init__(self, phases: Phases, *, limit: float, long: float, local: int = 0, locals: int = 1) -> None:
        self.phases, self.limit, self.long, self.local, self.locals = phases, limit, long, local, locals
        self.every = min(BEAT, limit / 10)
        self.over = threading.Event()
        self.threads: list[threading.Thread] = []
        self.rank, self.ranks = 0, 1
        self.store: Any = None
        self.answered = time.monotonic()  # when the store last did
        self.cards: dict[int, Card] = {}  # of rank 0 and of the next rank on this node
        self.wrong: dict[str, float] = {}  # since when the next one is stopped, or gone

    def begin(self) -> None:
        """Begin to watch."""
        works = [self.alone]
        if halt.together():
            halt.watch()
            halt.at_end(self.end_stopped)
            self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
            self.store = halt.own_store()
            self.meet()
            works = [self.talk, self.listen]
        self.answered = time.monotonic()
        self.threads = [threading.Thread(target=work, name="watchdog", daemon=True) for work in works]
        for thread in self.threads:
            thread.start()

    def part(self, *, wait: bool) -> None:
        """Stop watching; with `wait`, rank 0, which may hold the store, stays until the others have stopped too."""
        self.over.set()
        for thread in self.threads:
            thread.join(halt.LINGER)
        if self.store is not None and self.threads:
            halt.forget(self.end_stopped)
            store, deadline = self.store, time.monotonic() + PARTING
            left = [f"{PLACE}/left/{rank}" for rank in range(self.ranks)]
            halt.ask(lambda: store.set(left[self.rank], "1"), None)
            while (
                wait
                and self.rank == 0
                and time.monotonic() < deadline
                and not halt.ask(lambda: store.check(left), True)
            ):
                time.sleep(0.05)
        self.threads = []

    def awake(self, last: float) -> float:
        """Return the time now; where this process itself was stopped since `last`, nothing is late because of that."""
        now = time.monotonic()
        if now - last > 2 * self.every + 1:
            self.phases.since = self.answered = now
            self.wrong = {}
        return now

    def alone(self) -> None:
        """Say where this process stands still, each time after twice as long."""
        limit, last = self.limit, time.monotonic()
        while not self.over.wait(self.every):
            last, standing = self.awake(last), self.phases.standing()
            if standing.quiet < self.limit:
                limit = self.limit
            elif standing.quiet >= max(limit, self.long if standing.free else 0.0):
                limit = 2 * standing.quiet
                where = f"step {standing.step} ({standing.phase}) stands here:\n{halt.standing().rstrip()}"
                log.warning("no step has ended for %.0f s: %s", standing.quiet, where)

    def listen(self) -> None:
        """Look at what needs no answer: the process beside this one, and how long the store has been silent.

        Where whoever holds the store has stopped, or is cut off, this process ends by itself.
        """
        last = time.monotonic()
        while not self.over.wait(min(self.every / 2, 1.0)):
            last = self.awake(last)
            self.look_beside(last)
            if last - self.answered >= self.limit:
                halt.end(
                    f"{self.holder()} has not answered for {last - self.answered:.0f} s: {self.state(0) or 'cut off'}",
                    halt.OURS,
                )

    def talk(self) -> None:
        """Leave signs of life, and read those of others."""
        try:
            seen: list[Seen] = []
            last = time.monotonic()
            while not self.over.wait(self.every):
                now = time.monotonic()
                late, last = now - last > 2 * self.every + 1, now
                own = {"beat": now, "standing": asdict(self.phases.standing())}
                self.store.set(f"{PLACE}/beat/{self.rank}", json.dumps(own))
                self.read_cards()
                if self.rank < 2:  # the second comes to a verdict later, if the first does not
                    seen = self.read([] if late else seen)
                    later = 4 * self.rank * self.every
                    found = verdict(seen, time.monotonic(), self.limit + later, self.long + later)
                    if found:
                        self.end_all(*found)
                self.answered = time.monotonic()
        except RuntimeError:
            if not self.over.wait(halt.LINGER):  # or another rank's reason has ended this process by now
                halt.end(f"{self.holder()} is gone: {self.state(0) or 'it ended, or is cut off'}", halt.OURS)

    def read(self, seen: list[Seen]) -> list[Seen]:
        """Return what is known of each rank; nothing as long as one has not begun."""
        keys = [f"{PLACE}/beat/{rank}" for rank in range(self.ranks)]
        if not self.store.check(keys):
            return []
        now, found = time.monotonic(), []
        for rank, text in enumerate(self.store.multi_get(keys)):
            said = json.loads(text)
            standing, before = Standing(**said["standing"]), seen[rank] if seen else None
            heard = before.heard if before and before.beat == said["beat"] else now
            still = before and (before.standing.moves, before.standing.pieces) == (standing.moves, standing.pieces)
            moved = before.moved if before and still else now
            found.append(Seen(standing, said["beat"], heard, moved))
        return found

    @property
    def unknown(self) -> set[int]:
        """Whose cards are still to be read: of rank 0 and of the next rank on this node."""
        return {0, self.beside} - {self.rank} - set(self.cards)

    def meet(self) -> None:
        """Leave this process's card and read others', who begin at the same time; that of a late one is read later."""
        with suppress(RuntimeError):
            self.store.set(f"{PLACE}/card/{self.rank}", Card.own().text())
            self.store.wait([f"{PLACE}/card/{rank}" for rank in sorted(self.unknown)], MEETING)
            self.read_cards()

    def read_cards(self) -> None:
        """Read the cards that are still to be read, where they are there."""
        for rank in self.unknown:
            if self.store.check([f"{PLACE}/card/{rank}"]):
                self.cards[rank] = Card.read(self.store.get(f"{PLACE}/card/{rank}"))

    @property
    def beside(self) -> int:
        """The next rank on this node."""
        return self.rank - self.local + (self.local + 1) % self.locals

    def look_beside(self, now: float) -> None:
        """End the run where the next rank on this node has gone without a word, or has been stopped for too long."""
        state = self.cards[self.beside].state() if self.beside in self.cards else ""
        self.wrong = {state: self.wrong.get(state, now)} if state in (GONE, STOPPED) else {}
        late = now - self.wrong.get(state, now) >= {GONE: GONE_FOR, STOPPED: self.limit}.get(state, 0.0)
        if self.wrong and late:
            left = f"{PLACE}/left/{self.beside}"
            if not halt.ask(lambda: self.store.check([left]), False):
                self.end_all(f"rank {self.beside}'s {self.state(self.beside)}", [])

    def state(self, rank: int) -> str:
        """Return in words what is wrong with a rank's process, as far as this node knows."""
        card = self.cards.get(rank)
        state = card.state() if card else ""
        why = {GONE: f" without a word: killed, perhaps for want of memory; {halt.GOES_ON}", STOPPED: ""}
        return f"{card} {state}{why[state]}" if state in why else ""

    def holder(self) -> str:
        """Return in words who holds the store."""
        launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        return "the launcher's store, where the ranks meet," if launcher else "rank 0, where the ranks meet,"

    def end_all(self, reason: str, behind: list[int]) -> None:
        """End all ranks; those behind show where they stand."""
        if halt.announce(reason, halt.OURS, behind):
            halt.end(reason, halt.OURS)
        if not self.over.wait(halt.PATIENCE):  # in which another's reason, which was first, ends this process
            halt.end(reason, halt.OURS)

    def end_stopped(self) -> None:
        """Kill a stopped process beside this one, which could not end by itself."""
        for card in self.cards.values():
            card.kill()
