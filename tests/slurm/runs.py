"""Runs small enough for a SLURM of two cores, and what two of them have in common."""

from __future__ import annotations

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from cluster import Cluster

from soratrain.callbacks.metrics import NOT_REPEATABLE

ROOT = Path(__file__).resolve().parents[2]
SORATRAIN = [sys.executable, "-m", "soratrain"]
TINY = ["machine=laptop", "machine.precision=32-true", "trainer.accelerator=cpu", "machine.tuned.vae.tokens=64",
        "trainer.log_every=1", "optimizer=adamw", "logger=csv"]  # fmt: skip
TWO_NODES = ["stage=vae", *TINY, "strategy=zero3", "trainer.num_nodes=2", "trainer.devices=1"]
LAUNCHED = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]


def make_world(slurm: Cluster, folder: Path) -> None:
    """Make a few clips to train on."""
    words = [sys.executable, "-m", "data_prep", "input=world", "world.clips=24", "workers=1"]
    made = slurm.run(*words, cwd=folder, timeout=300)
    assert made.returncode == 0, made.stderr


def start(slurm: Cluster, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start a command on the login node; what it says goes to `terminal.txt`."""
    with (folder / "terminal.txt").open("w") as said:
        return subprocess.Popen(words, cwd=folder, env=slurm.environment, stdout=said, stderr=said, text=True)


def submit(slurm: Cluster, folder: Path, script: str, *options: str) -> str:
    """Submit a script and return the job's number."""
    (folder / "job.sh").write_text(script)
    done = slurm.run("sbatch", "--parsable", *options, "job.sh", cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def state(slurm: Cluster, job: str) -> str:
    """Return a job's state, as long as SLURM remembers it."""
    said = slurm.run("scontrol", "show", "job", job, "-o").stdout
    return next((word.split("=")[1] for word in said.split() if word.startswith("JobState=")), "")


def until(ready: Callable[[], object], folder: Path, seconds: float = 240) -> None:
    """Wait until `ready()` holds; where it does not, show what was said."""
    end = time.monotonic() + seconds
    while not ready():
        if time.monotonic() > end:
            said = [f"== {file}\n{file.read_text(errors='replace')[-3000:]}" for file in sorted(folder.rglob("*.log"))]
            raise TimeoutError("\n".join([(folder / "terminal.txt").read_text(), *said]))
        time.sleep(0.3)


def rows(out: Path) -> list[dict[str, str]]:
    """Return what can be repeated of a run's metrics."""
    file = out / "metrics.csv"
    found = list(csv.DictReader(file.read_text().splitlines())) if file.is_file() else []
    return [{key: value for key, value in row.items() if key not in NOT_REPEATABLE} for row in found]


def same(left: Path, right: Path, steps: int) -> None:
    """Compare two finished runs bit for bit: their metrics at every step, and their weights."""
    assert [row["step"] for row in rows(left)] == [str(step + 1) for step in range(steps)]
    assert rows(left) == rows(right)
    for file in sorted((left / "weights").glob("*.safetensors")):
        assert file.read_bytes() == (right / "weights" / file.name).read_bytes()
