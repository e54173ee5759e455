"""A sweep on a real SLURM: its jobs are the tasks of one array, each in a folder of its own."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
TINY = ["machine.steps.vae=3", "machine.tuned.vae.tokens=64", "trainer.accelerator=cpu", "logger=csv", "machine=laptop"]

pytestmark = pytest.mark.full


def test_a_job_runs_on_two_nodes(slurm: Cluster) -> None:
    done = slurm.run("srun", "-N2", "-n2", "printenv", "SLURM_NODEID")
    assert sorted(done.stdout.split()) == ["0", "1"], done.stderr + slurm.logs()


def test_a_sweep_runs_as_a_job_array_and_its_jobs_keep_to_their_folders(slurm: Cluster, tmp_path: Path) -> None:
    slurm.environment["PYTHONPATH"] = str(ROOT)
    made = slurm.run(
        sys.executable, "-m", "data_prep", "input=world", "world.clips=24", "workers=1", cwd=tmp_path, timeout=120
    )
    assert made.returncode == 0, made.stderr
    sweep = [sys.executable, "-m", "soratrain", "-m", "stage=vae", "optimizer.lr=1e-3,3e-3", *TINY]
    sweep += ["hydra/launcher=slurm", "hydra.launcher.gpus_per_node=null", "hydra.launcher.cpus_per_task=1"]
    done = slurm.run(*sweep, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr + slurm.logs()
    folders = sorted((tmp_path / "outputs/default/vae/sweep").glob("*/result.json"))
    results = [json.loads(path.read_text()) for path in folders]
    assert len(results) == 2 and all(result["step"] == 3 for result in results)
    assert len({result["loss"] for result in results}) == 2
    tasks = sorted(path.name for path in (tmp_path / "outputs/default/vae/sweep/.submitit").glob("*_*[0-9]"))
    assert [name.split("_")[1] for name in tasks] == ["0", "1"] and len({name.split("_")[0] for name in tasks}) == 1
    again = slurm.run(*sweep, cwd=tmp_path, timeout=300)
    assert again.returncode == 0, again.stderr
    assert [json.loads(path.read_text()) for path in folders] == results
