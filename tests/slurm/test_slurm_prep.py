"""data_prep as a job array on a real SLURM: the very same shards, and a command that goes on after anything."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cluster import Cluster

ROOT = Path(__file__).resolve().parents[2]
SLURM = ["engine=slurm", "slurm.jobs=3", "slurm.cpus=1"]

pytestmark = pytest.mark.full


def prep(*argv: str) -> list[str]:
    return [sys.executable, "-m", "data_prep", "input=world", "world.clips=120", *argv]


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("local")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(prep("output=w"), cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return digests(folder / "w")


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(autouse=True)
def importable(slurm: Cluster) -> None:
    slurm.environment["PYTHONPATH"] = str(ROOT)


def test_jobs_make_the_very_same_shards_as_one_machine(slurm: Cluster, tmp_path: Path, local: dict[str, str]) -> None:
    done = slurm.run(*prep("output=w", *SLURM), cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr + slurm.logs()
    assert digests(tmp_path / "w") == local


def test_a_command_whose_process_and_jobs_were_killed_goes_on(
    slurm: Cluster, tmp_path: Path, local: dict[str, str]
) -> None:
    process = subprocess.Popen(prep("output=w", *SLURM), cwd=tmp_path, env=slurm.environment, stderr=subprocess.PIPE)
    units = tmp_path / "w/.building/units"
    while not list(units.glob("*.json")) or not (units / "jobs.json").is_file():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    process.kill()
    process.wait()
    done = slurm.run(*prep("output=w", *SLURM), cwd=tmp_path, timeout=180)
    assert done.returncode == 0, done.stderr + slurm.logs()
    assert "continuing" in done.stdout and digests(tmp_path / "w") == local
    assert slurm.run("squeue", "-h").stdout == ""


def test_a_job_that_is_cancelled_is_one_clear_line_and_the_same_command_continues(
    slurm: Cluster, tmp_path: Path, local: dict[str, str]
) -> None:
    process = subprocess.Popen(
        prep("output=w", *SLURM), cwd=tmp_path, env=slurm.environment, stderr=subprocess.PIPE, text=True
    )
    while not (tmp_path / "w/.building/units/jobs.json").is_file():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    slurm.run("scancel", "--user=root")
    said = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    (line,) = [line for line in said.splitlines() if line.startswith("error:")]
    assert "engine=slurm: job" in line and "before its work did" in line and "the same command continues" in line
    assert slurm.run(*prep("output=w", *SLURM), cwd=tmp_path, timeout=180).returncode == 0
    assert digests(tmp_path / "w") == local


def test_a_partition_that_is_not_there_is_one_clear_line(slurm: Cluster, tmp_path: Path) -> None:
    done = slurm.run(*prep("output=w", *SLURM, "slurm.partition=nowhere"), cwd=tmp_path, timeout=60)
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode == 2 and "invalid partition" in line and "slurm.partition" in line
