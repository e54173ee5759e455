"""Runs a function in several processes that talk over gloo, as a launcher would start them.

The processes are forked from a server that has the heavy libraries loaded, so that each run takes about a second.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
UNIT = Path(__file__).parents[1] / "unit"


def start_server() -> None:
    """Start the server that the processes are forked from; it finds modules where this process does."""
    before = {key: os.environ.get(key) for key in ("PYTHONPATH", "DS_ACCELERATOR")}
    os.environ.update(PYTHONPATH=os.pathsep.join(sys.path), DS_ACCELERATOR="cpu")
    slow = (
        "deepspeed.runtime.zero.muon.muon_optimizer"  # DeepSpeed loads it with any optimizer, and the inductor with it
    )
    CONTEXT.set_forkserver_preload(["tiny_training", "soratrain.distributed.zero", slow])
    forkserver.ensure_running()
    for key, value in before.items():
        os.environ.pop(key) if value is None else os.environ.update({key: value})


def hear() -> None:
    """Take signals again: the server, where a loader has started it, is deaf to some, and so is whoever it forks."""
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def one_rank(rank: int, count: int, port: int, pipe: Any, function: Callable[..., Any], kwargs: dict[str, Any]) -> None:
    import torch

    hear()
    torch.set_num_threads(1)
    os.cpu_count = lambda: count  # or a trainer refuses more ranks than there are cores
    if count > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), WORLD_SIZE=str(count))
    try:
        pipe.send((True, function(**kwargs)))
    except BaseException as error:  # whatever it is, the test must hear of it
        pipe.send((False, f"rank {rank}: {type(error).__name__}: {error}\n{traceback.format_exc()}"))


def run_ranks(function: Callable[..., Any], count: int, timeout: float = 120, **kwargs: Any) -> list[Any]:
    """Return what `function(**kwargs)` returns on each of `count` ranks; raise what one of them raised."""
    start_server()
    port, processes, pipes = free_port(), [], []
    for rank in range(count):
        here, there = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=one_rank, args=(rank, count, port, there, function, kwargs))
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    try:
        answers = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout):
                raise TimeoutError(f"rank {rank} said nothing for {timeout} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                processes[rank].join(5)  # its exit code comes a moment later
                answers.append((False, f"rank {rank} died with exit code {processes[rank].exitcode}"))
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    failures = [value for ok, value in answers if not ok]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in answers]


class Scripts:
    """Processes that run a script: `script PLACE OUT PAUSE fail`, one alone or two as torchrun starts them."""

    def __init__(self, script: str) -> None:
        self.script = script

    def start(
        self, place: Path, out: str, *, pause: float = 0.0, fail: bool = False, **env: object
    ) -> subprocess.Popen[str]:
        """Start a process."""
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(UNIT), *sys.path]), "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in env.items()}
        words = [sys.executable, "-c", self.script, str(place), out, str(pause), "fail" if fail else ""]
        return subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def launched(self, place: Path, out: str, fail: int | None = None) -> list[tuple[int, str, str]]:
        """Run two ranks, of which one may fail; return the exit code and output of each."""
        common = {"WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        ranks = [self.start(place, out, fail=rank == fail, RANK=rank, LOCAL_RANK=rank, **common) for rank in range(2)]
        said = [process.communicate(timeout=120) for process in ranks]
        return [(process.returncode, *texts) for process, texts in zip(ranks, said, strict=True)]
