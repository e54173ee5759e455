"""Training runs on latents made up for the purpose, each in a process of its own, for benchmarks that need a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Run:
    """What became of a run: seconds of each step after the first ones, its peak memory in GiB, or why it ended."""

    seconds: list[float]
    memory_gib: float = 0.0
    failed: str = ""


def latents(folder: Path, shape: tuple[int, int, int], clips: int = 64) -> Path:
    """Write latents of clips of (height, width, frames)."""
    from data_tiny import write_latents

    made = write_latents(folder / "latents", [shape] * clips, channels=16)
    (made / "dataset.json").write_text("{}")  # what says that they are whole
    return made


def train(folder: Path, data: Path, words: list[str], *, steps: int, warm: int, cuda: bool) -> Run:
    """Train; `words` are further overrides."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if not cuda:
        environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "soratrain", "stage=dit", "upstream=fail", "validation=none", "fresh=true"]
    command += [f"out={folder}", f"inputs.latents={data}", "inputs.captions=null", "optimizer=adamw"]
    command += ["trainer.devices=1", f"trainer.max_steps={steps}", "trainer.log_every=1", "trainer.checkpoint_every=0"]
    command += [f"trainer.accelerator={'cuda' if cuda else 'cpu'}", *words]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    if done.returncode:
        memory = "OutOfMemory" in said or "out of memory" in said
        return Run([], failed="out of memory" if memory else said.strip().splitlines()[-1])
    names, *rows = [line.split(",") for line in (folder / "metrics.csv").read_text().splitlines()]
    seconds = [float(row[names.index("seconds")]) for row in rows[warm:]]
    return Run(seconds, max(float(row[names.index("memory_gib")]) for row in rows))
