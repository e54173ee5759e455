"""A sweep on a real SLURM: its jobs are the tasks of one array, each in a folder of its own."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from cluster import Cluster
from runs import LAUNCHED, ROOT, SORATRAIN, TINY, make_world

SWEEP = [*SORATRAIN, "-m", "stage=vae", "optimizer.lr=1e-3,3e-3", "seed=1,2", *TINY, "machine.steps.vae=3", *LAUNCHED]

pytestmark = pytest.mark.full


def test_a_sweep_of_four_runs_as_a_job_array_and_can_be_widened(slurm: Cluster, tmp_path: Path) -> None:
    slurm.environment["PYTHONPATH"] = str(ROOT)
    make_world(slurm, tmp_path)
    done = slurm.run(*SWEEP, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr + slurm.logs()
    root = tmp_path / "outputs/default/vae/sweep"
    folders = sorted(root.glob("*/result.json"))
    results = [json.loads(path.read_text()) for path in folders]
    assert len(results) == 4 and all(result["step"] == 3 for result in results)
    assert len({result["loss"] for result in results}) == 4
    tasks = sorted(path.name for path in (root / ".submitit").glob("*_*[0-9]"))
    assert [name.split("_")[1] for name in tasks] == list("0123") and len({name.split("_")[0] for name in tasks}) == 1
    assert all("loss" in (path.parent / "logs/rank-00000.log").read_text() for path in folders)
    wider = slurm.run(*[word.replace("seed=1,2", "seed=1,2,3") for word in SWEEP], cwd=tmp_path, timeout=400)
    assert wider.returncode == 0, wider.stderr
    assert wider.stderr.count("is done in outputs") == 4 and "an array of 2 jobs" in wider.stderr
    assert [json.loads(path.read_text()) for path in folders] == results
    assert len(list(root.glob("*/result.json"))) == 6
    told = slurm.run(*SORATRAIN, "stage=sweep_report", "machine=laptop", cwd=tmp_path, timeout=120)
    assert told.returncode == 0 and "6 runs: 6 done" in told.stdout, told.stderr
    rows = list(csv.DictReader((tmp_path / "outputs/default/sweep_report/base/vae.csv").read_text().splitlines()))
    assert {(float(row["optimizer.lr"]), row["seed"]) for row in rows} == {
        (lr, n) for lr in (1e-3, 3e-3) for n in "123"
    }


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["hydra.launcher.partition=nowhere"],
            "partition=nowhere, 1 node of 1 task and no GPUs): *invalid partition",
        ),
        (["strategy=ddp", "trainer.num_nodes=3"], "it would never start job .* (PartitionNodeLimit)"),
        (["hydra.launcher.gpus_per_node=2"], "2 GPUs): *Invalid generic resource (gres) specification"),
    ],
)
def test_what_the_cluster_does_not_have_is_one_clear_line(
    slurm: Cluster, tmp_path: Path, words: list[str], said: str
) -> None:
    slurm.environment["PYTHONPATH"] = str(ROOT)
    (tmp_path / "data/world").mkdir(parents=True)
    (tmp_path / "data/world/dataset.json").write_text("{}")
    command = [*SORATRAIN, "-m", "stage=vae", *TINY, *LAUNCHED, "trainer.devices=1", *words]
    done = slurm.run(*command, cwd=tmp_path, timeout=120)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and line.startswith("error: hydra/launcher=slurm: SLURM refuses what is asked for")
    assert all(part in line for part in said.split("*")[-1].split(".*")), line
    assert "Traceback" not in done.stderr and slurm.run("squeue", "-h").stdout == ""
