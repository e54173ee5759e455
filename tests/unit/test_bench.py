"""Promises of `make bench`: every benchmark is found, and one that is run again leaves the others' figures alone."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.syspath_prepend(str(BENCH))
    module = importlib.import_module("run")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "RESULTS.md")
    return module


def test_every_benchmark_has_a_title_and_can_be_measured(run) -> None:
    names = [path.stem for path in BENCH.glob("bench_*.py")]
    assert len(names) >= 6
    for name in names:
        module = importlib.import_module(name)
        assert module.TITLE and callable(module.measure)


def test_a_benchmark_run_again_replaces_its_own_table_alone(run, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    for name, value in (("balance", "1"), ("plan", "2"), ("balance", "3")):
        module = importlib.import_module(f"bench_{name}")
        monkeypatch.setattr(module, "measure", lambda name=name, value=value: [{"way": name, "figure": value}])
        assert run.main([name]) == 0
    text = run.RESULTS.read_text()
    assert text.index("## balance") < text.index("## plan") and text.count("## ") == 2
    assert "| balance | 3 |" in text and "| plan | 2 |" in text and "| balance | 1 |" not in text
    assert "cores" in text and "torch" in text


def test_an_unknown_benchmark_is_one_line(run, capsys) -> None:
    assert run.main(["nothing"]) == 2
    assert "nothing: no such benchmark; use balance" in capsys.readouterr().err
