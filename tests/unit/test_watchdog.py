"""When a run counts as stalled, who is behind, and what a process knows of the one beside it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from soratrain.callbacks.export import Export
from soratrain.distributed import halt, phases, watchdog
from soratrain.distributed.neighbours import GONE, RUNS, STOPPED, UNKNOWN, Card
from soratrain.distributed.phases import Phases, Standing
from soratrain.distributed.watchdog import Seen, Watchdog, verdict

LIMIT, LONG = 60.0, 900.0


def seen(moves: int, *, moved: float, heard: float = 1000.0, phase: str = "data", free: bool = False) -> Seen:
    return Seen(Standing(phase, 12, moves, 0.0, free), 1.0, heard, moved)


def test_the_rank_that_has_done_least_is_behind_once_nobody_has_moved_for_so_long() -> None:
    ranks = [seen(50, moved=900.0, phase="optimizer"), seen(48, moved=890.0), seen(50, moved=930.0)]
    assert verdict(ranks, 980.0, LIMIT, LONG) is None  # the last moved 50 s ago
    words, behind = verdict(ranks, 1000.0, LIMIT, LONG) or ("", [])
    assert behind == [1]
    assert words == "no step has ended for 70 s: rank 1 is behind, at step 12 (data), and the others wait"


@pytest.mark.parametrize("phase", ["validation", "export"])
def test_a_rank_at_what_takes_long_has_a_limit_of_its_own_and_so_have_those_who_wait_for_it(phase: str) -> None:
    ranks = [seen(50, moved=0.0), seen(48, moved=0.0, phase=phase, free=True)]
    assert verdict(ranks, LONG - 1, LIMIT, LONG) is None
    words, behind = verdict(ranks, LONG, LIMIT, LONG) or ("", [])
    assert behind == [1] and f"for 900 s: rank 1 is behind, at step 12 ({phase}), and the others wait; if it" in words
    assert words.endswith("if it may take longer, give a larger strategy.timeout_minutes")
    assert verdict([], 1000.0, LIMIT, LONG) is None


def test_a_rank_that_is_silent_at_what_takes_long_is_named_too() -> None:
    ranks = [seen(50, moved=990.0), seen(48, moved=90.0, heard=90.0, phase="export", free=True)]
    assert verdict(ranks, 980.0, LIMIT, LONG) is None
    words, behind = verdict(ranks, 1000.0, LIMIT, LONG) or ("", [])
    assert behind == [1] and words.startswith("rank 1 has shown no sign of life for 910 s, since step 12 (export)")


def test_a_rank_whose_thread_is_silent_is_named_before_those_that_wait_for_it() -> None:
    words, behind = verdict([seen(48, moved=900.0), seen(50, moved=900.0, heard=930.0)], 1000.0, LIMIT, LONG) or (
        "",
        [],
    )
    assert behind == [1] and words.startswith("rank 1 has shown no sign of life for 70 s, since step 12 (data)")


def test_of_two_threads_that_see_a_process_killed_the_one_that_knows_its_signal_is_not_talked_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said, asked = dict[str, str](), threading.Event()
    store = SimpleNamespace(set=lambda key, text: (said.update({key: text}), asked.set()))
    for name, value in {"together": lambda: True, "claim": lambda: True, "LINGER": 0.5}.items():
        monkeypatch.setattr(halt, name, value)
    monkeypatch.setattr(halt, "_telling", threading.Lock())
    monkeypatch.setattr(halt, "_get_default_store", lambda: store)
    monkeypatch.setattr(halt.dist, "get_rank", lambda: 0)
    first = threading.Thread(target=halt.announce, args=("killed by signal 9", halt.OURS))
    first.start()
    assert asked.wait(10) and not halt.announce("gone without a word", halt.OURS)
    first.join()
    assert json.loads(said[halt.KEY])["reason"] == "killed by signal 9"


def test_where_all_stand_alike_it_is_nobody_s_fault() -> None:
    words, behind = verdict([seen(48, moved=900.0), seen(48, moved=900.0)], 1000.0, LIMIT, LONG) or ("", [])
    assert behind == [0, 1] and "all ranks stand at step 12 (data); is the network between them up?" in words
    words, _ = verdict([seen(48, moved=0.0, phase="export", free=True)] * 2, 1000.0, LIMIT, LONG) or ("", [])
    mend = "if it may take longer, give a larger strategy.timeout_minutes; is the network between them up?"
    assert words.endswith(f"all ranks stand at step 12 (export); {mend}")


class Store(dict):
    """Where ranks leave their signs of life."""

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self[key] for key in keys]


def test_a_slow_export_may_take_any_time_as_long_as_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    for module in (phases, watchdog):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    ranks, dog = [Phases(), Phases()], Watchdog(Phases(), limit=LIMIT, long=LONG)
    known: list[Seen] = []
    found: list[tuple[str, list[int]] | None] = []
    dog.store, dog.ranks = Store(), 2

    def look() -> None:
        nonlocal known
        for rank, own in enumerate(ranks):
            beat = {"beat": now, "standing": asdict(own.standing())}
            dog.store[f"{watchdog.PLACE}/beat/{rank}"] = json.dumps(beat)
        known = dog.read(known)
        found.append(verdict(known, now, LIMIT, LONG))

    tensors = [("weight", torch.zeros(1))] * 6
    work = [Export(Path("weights"), phases=own).heeding(iter(tensors)) for own in ranks]
    for own in ranks:
        own.start("[Callback]Export.on_train_end")
    look()
    for _ in tensors:
        now += LONG / 2
        next(work[0])
        next(work[1])
        look()
    assert now > 2 * LONG and found == [None] * 7
    now += LONG / 2
    ranks[1].move(alike=False)  # what it alone has to do, as far as it has come
    look()
    now += LONG / 2
    look()
    assert found[7:] == [None, None]
    now += LONG / 2
    look()
    words, behind = found[-1] or ("", [])
    assert behind == [0, 1] and "for 900 s: all ranks stand at step 1 (export)" in words


@pytest.mark.parametrize(
    ("actions", "phase", "free"),
    [
        ([], "beginning or end", True),
        (["run_training_epoch"], "between steps", False),
        (["run_training_epoch", "[_TrainingEpochLoop].train_dataloader_next"], "data", False),
        (["run_training_epoch", "[LightningModule]S.optimizer_step"], "optimizer", False),
        (
            ["run_training_epoch", "[LightningModule]S.optimizer_step", "[Strategy]D.backward"],
            "forward/backward",
            False,
        ),
        (["run_training_epoch", "[Callback]Validation.on_train_batch_end"], "validation", True),
        (["run_training_epoch", "[Callback]Checkpoint.on_train_batch_end", "save_checkpoint"], "checkpoint", True),
    ],
)
def test_the_innermost_known_action_is_the_phase(actions: list[str], phase: str, free: bool) -> None:
    own, done = Phases(), 7
    own.follow(lambda: done)
    done = 8
    for action in actions:
        own.start(action)
    standing = own.standing()
    assert (standing.phase, standing.step, standing.moves, standing.free) == (phase, 9, len(actions), free)
    done = 7
    assert own.standing().free  # the first step, which may compile


def test_waiting_for_the_loader_is_added_up() -> None:
    own = Phases()
    with own.profile("[L].train_dataloader_next"):
        time.sleep(0.05)
    waited = own.waited
    with own.profile("[Strategy]D.backward"):
        time.sleep(0.05)
    assert 0.05 <= waited == own.waited


def test_a_process_is_known_to_run_to_be_stopped_and_to_have_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    own = Card.own()
    try:
        begun = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        card = Card(own.host, own.namespace, process.pid, begun)
        assert Card.read(card.text()) == card and card.state() == RUNS
        card.kill()  # only what is stopped
        os.kill(process.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while card.state() != STOPPED and time.monotonic() < deadline:
            time.sleep(0.01)
        assert card.state() == STOPPED
        assert Card(own.host, "elsewhere", process.pid, begun).state() == UNKNOWN
        assert Card(own.host, own.namespace, process.pid, "1").state() == GONE  # another with the same number
        card.kill()
        assert process.wait(5) == -signal.SIGKILL and card.state() == GONE
    finally:
        process.kill()
        process.wait()
