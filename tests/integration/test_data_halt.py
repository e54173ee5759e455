"""A rank or a worker that cannot go on ends the run, soon and with its reason; the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(UNIT))

pytestmark = pytest.mark.full
PROGRAM = """
import sys
from pathlib import Path
import torch, torch.distributed as dist
from soratrain.data.datamodule import LatentData
from soratrain.errors import UserError

rank, port, folder, quarantine = int(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4]
if __name__ == "__main__":
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    data = LatentData(latents=folder, seed=3, max_steps=500, batch_size=1, workers=int(sys.argv[5]), canonical_ranks=2,
                      quarantine=quarantine, max_bad=0.0, cache=0)
    data.seat = (rank, 2)
    try:
        for number, batch in enumerate(data.loader(0, 500)):
            dist.all_reduce(torch.ones(4))
    except UserError as error:
        sys.stderr.write(f"error: {error}\\n")
        sys.exit(2)
"""


@pytest.mark.parametrize("workers", [0, 1])
def test_a_rank_whose_data_fail_stops_all_ranks_with_its_reason(tmp_path, workers):
    from data_tiny import write_latents
    from ranks import free_port

    from soratrain.data.reading import read_manifest

    folder = write_latents(tmp_path / "shards", [(32, 32, 9)] * 40)
    script = tmp_path / "program.py"
    script.write_text(PROGRAM)
    for row in list(read_manifest(folder).rows())[::3]:
        with open(folder / row.shard, "r+b") as file:
            file.seek(row.media_offset + 9)
            file.write(b"\xff" * 9)
    port = str(free_port())
    began = time.monotonic()
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, folder, tmp_path / "q", str(workers)],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == [2, 2], said
    assert time.monotonic() - began < 40
    assert all("data.max_bad=0.0 allows" in words and "Traceback" not in words for words in said), said
    keys = [json.loads(line)["key"] for line in (tmp_path / "q").read_text().splitlines()]
    assert len(keys) == len(set(keys)) >= 4  # each once, whichever rank found it


@pytest.mark.parametrize("sort", ["SIGKILL", "SIGSEGV"])
def test_a_worker_that_dies_is_started_again_and_the_batches_are_the_same(sort, tmp_path, caplog):
    from data_tiny import write_latents
    from test_data_loader import cached, same

    folder = write_latents(tmp_path / "shards", [(32, 32, 9)] * 40)
    loader, found = cached(str(folder), workers=2, prefetch=1).loader(5, 40), []
    with caplog.at_level("WARNING"):
        for batch in loader:
            found.append(batch)
            if len(found) in (3, 20):
                os.kill(loader._iterator._workers[len(found) % 2].pid, getattr(signal, sort))
    number = int(getattr(signal, sort))
    assert caplog.text.count(f"was killed by signal {number} ({sort})") == 2
    assert "loading goes on from micro-batch" in caplog.text and "(1 of 3 tries)" in caplog.text
    assert all(same(a, b) for a, b in zip(found, cached(str(folder)).loader(5, 40), strict=True))


def test_a_worker_that_dies_again_and_again_is_a_clear_error(tmp_path):
    from data_tiny import write_latents
    from test_data_loader import cached

    from soratrain.errors import DataError

    folder = write_latents(tmp_path / "shards", [(32, 32, 9)] * 40)
    loader = cached(str(folder), workers=1, prefetch=1).loader(0, 40)
    items = loader.dataset.items
    items.source = Deadly(items.source)
    with pytest.raises(
        DataError, match=r"loader process 0 of 1 .*killed by signal 9.*, 4 times in a row at micro-batch 0"
    ):
        next(iter(loader))


class Deadly:
    """A source of samples of which the first kills the process that loads it."""

    def __init__(self, source):
        self.manifest, self.reader = source.manifest, source.reader

    def cached(self, index, bucket):
        return False

    def load(self, index, bucket, draw):
        os.kill(os.getpid(), signal.SIGKILL)


def test_workers_end_with_the_training_process_however_it_ends(tmp_path):
    from data_tiny import write_latents

    folder = write_latents(tmp_path / "shards", [(32, 32, 9)] * 40)
    program = (
        "import os, sys\nfrom soratrain.data.datamodule import LatentData\nif __name__ == '__main__':\n"
        "    loader = LatentData(latents=sys.argv[1], seed=3, max_steps=9, batch_size=1, workers=2).loader(0, 9)\n"
        "    next(iter(loader)); print(*(worker.pid for worker in loader._iterator._workers), flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    script = tmp_path / "program.py"
    script.write_text(program)
    pids = subprocess.run([sys.executable, script, folder], capture_output=True, text=True, timeout=60).stdout.split()
    assert len(pids) == 2 and not any(alive(int(pid)) for pid in pids)


def alive(pid: int) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and Path(f"/proc/{pid}").exists():
        time.sleep(0.1)
    return Path(f"/proc/{pid}").exists()
