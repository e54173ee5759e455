"""Benchmarks that need a GPU: what they do is tried on a CPU, and without CUDA they say so in a line."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "bench"
TINY = ("machine=laptop", "dit=nano", "vae=tiny", "data.batch_size=2", "data.tokens_per_batch=null")
SHAPE = (48, 64, 9)


@pytest.fixture(autouse=True)
def bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without CUDA")
@pytest.mark.parametrize("name", ["zero_gpu", "offload_gpu", "dit_gpu"])
def test_without_cuda_a_benchmark_of_gpus_is_one_line_and_leaves_its_table(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    run = importlib.import_module("run")
    monkeypatch.setattr(run, "RESULTS", tmp_path / "RESULTS.md")
    assert run.main([name]) == 1 and not run.RESULTS.exists()
    assert capsys.readouterr().err == f"bench {name}: not measured: no CUDA device is here\n"


def test_ratios_are_of_runs_in_the_same_round_and_judged_by_what_is_asked() -> None:
    from bench_zero_gpu import rows

    taken = {"ddp": [[1.0, 1.0], [2.0]], "zero1": [[1.02], [2.1]], "zero2": [[1.2], [2.2]]}
    found = {row["strategy"]: (row["by ddp"].split()[0], row["at most 1.05"]) for row in rows(taken)}
    assert found == {"ddp": ("1.000", ""), "zero1": ("1.035", "yes"), "zero2": ("1.150", "no")}


@pytest.mark.parametrize("gib", [24, 80, 141])
def test_the_dit_of_the_offload_benchmark_fits_by_offload_alone(gib: int) -> None:
    from bench_offload_gpu import WAYS, depth_for, foretold

    depth = depth_for(gib * 2**30)
    told = {way: foretold(way, depth) for way in WAYS}
    for way in ("ddp", "zero2", "zero3"):
        assert told[way][0] > gib
    assert told["zero3_offload"][0] < gib / 4
    assert 1.4 * gib < told["zero3_offload"][1] < 1.65 * gib


@pytest.mark.full
def test_what_the_benchmarks_of_gpus_do_runs_on_a_cpu() -> None:
    from bench_offload_gpu import tried
    from bench_zero_gpu import WAYS, turns

    found = turns(cuda=False, rounds=1, steps=3, warm=1, shape=SHAPE, words=TINY)
    assert [row["strategy"] for row in found] == list(WAYS) and all(float(row["s/step"].split()[0]) for row in found)
    (row,) = tried(1, cuda=False, ways=("zero3_offload",), shape=SHAPE, words=TINY, dim=48, heads=2)
    assert row["trains"] == "yes" and float(row["peak, GiB of the GPU"]) > 0
    (row,) = tried(1, cuda=False, ways=("zero3",), shape=SHAPE, words=(*TINY, "dit.depht=1"), dim=48, heads=2)
    assert row["trains"].startswith("no: ") and "dit.depht" in row["trains"]
