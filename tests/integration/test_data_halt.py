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


def test_a_killed_worker_is_a_clear_error_and_the_rest_comes_after_it(tmp_path):
    from data_tiny import write_latents
    from test_data_loader import cached, same

    from soratrain.errors import DataError

    folder = write_latents(tmp_path / "shards", [(32, 32, 9)] * 40)
    loader = cached(str(folder), workers=2, prefetch=1).loader(0, 40)
    batches, found = iter(loader), []
    with pytest.raises(DataError, match="a loader process was killed.*the same command goes on"):
        for batch in batches:
            found.append(batch)
            if len(found) == 3:
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
    assert 3 <= len(found) < 40
    found += cached(str(folder), workers=2).loader(len(found), 40)
    assert all(same(a, b) for a, b in zip(found, cached(str(folder)).loader(0, 40), strict=True))


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
