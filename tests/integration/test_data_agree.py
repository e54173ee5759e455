"""Ranks that see other data stop at once, all of them, and say so."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
PROGRAM = """
import sys
import torch, torch.distributed as dist
from soratrain.distributed import halt
from soratrain.distributed.agree import agree
from soratrain.errors import UserError

rank, port, hashes = int(sys.argv[1]), sys.argv[2], sys.argv[3].split(",")
halt.EVERY = 0.0  # so that its thread is at the store whenever the process ends
dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
try:
    agree("plan", {"seed": 1, "manifest_hash": hashes[rank]})
    dist.all_reduce(torch.ones(4))  # never completes where the other rank is gone
except UserError as error:
    sys.stderr.write(f"error: {error}\\n")
    sys.exit(2)
"""


@pytest.mark.parametrize("hashes, codes", [("a,a", [0, 0]), ("a,b", [2, 2])])
def test_ranks_compare_their_plans_before_the_first_step(tmp_path: Path, hashes: str, codes: list[int]) -> None:
    from ranks import free_port

    script, port = tmp_path / "program.py", str(free_port())
    script.write_text(PROGRAM)
    ranks = [
        subprocess.Popen([sys.executable, script, str(rank), port, hashes], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    said = [process.communicate(timeout=60)[1] for process in ranks]
    assert [process.returncode for process in ranks] == codes, said
    if codes[1]:
        assert "manifest_hash is b on rank 1" in said[1] and "a on rank 0" in said[1]
        assert "rank 1: manifest_hash is b" in said[0], said
