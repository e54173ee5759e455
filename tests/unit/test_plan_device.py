"""A device's figures come with their sources, are shared by who shares it, and are refused where they cannot be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import yaml

from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.schema import CONF
from soratrain.stages import plan_device
from soratrain.stages.plan_device import (
    FIGURES,
    GIVEN,
    SAID,
    described,
    device_of,
    measured_tflops,
    rests_on,
    threads_of_a_rank,
)

KNOWN: dict[str, Any] = yaml.safe_load((CONF / "stage" / "plan.yaml").read_text())["stage"]["devices"]


@pytest.mark.parametrize("name", KNOWN)
def test_every_figure_that_is_shipped_says_where_it_is_from(name: str) -> None:
    device = described(KNOWN, name)
    own = {"per_node", *(("bf16_tflops", "fp32_tflops", "memory_gib") if name == "cpu" else ())}
    for figure in set(FIGURES) - own:
        source = device.sources[figure].removeprefix("as h100: ")
        assert source.startswith(("data sheet", "cited: ", "measured: ", "assumed")), (figure, source)


@pytest.mark.parametrize("name", ["h100", "h200", "a100"])
def test_what_was_found_in_bf16_is_said_to_be_assumed_of_fp32(name: str) -> None:
    mine = {"like": name, "matmul": [0.9, "measured: in fp32, on ours"]}
    for half in (True, False):
        device, own = described(KNOWN, name), described({**KNOWN, "mine": mine}, "mine")
        found, ours = (
            {row["figure"]: row["from"] for row in rests_on(of, StrategyOptions(), half=half, ranks=1, nodes=1)}
            for of in (device, own)
        )
        for figure in ("matmul", "attention"):
            assert found[SAID[figure]] == ("" if half else "assumed to be as in bf16: ") + device.sources[figure]
        assert ours[SAID["matmul"]] == "measured: in fp32, on ours"


def test_a_device_is_like_another_but_for_what_it_says_itself() -> None:
    own = {"like": "h200", "bf16_tflops": 1000, "hidden": [0.9, "measured: on ours"]}
    device, nodes = device_of({**KNOWN, "mine": own}, "mine", True, ranks=9)
    assert (device.bf16_tflops, device.memory_gb_s, device.matmul, nodes) == (1000, 4800, 0.803, 2)
    assert device.sources["bf16_tflops"] == GIVEN and device.sources["hidden"] == "measured: on ours"
    assert device.sources["matmul"].startswith("as h200: as h100: cited")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (3, "stage.devices.mine=3: must hold figures by name"),
        ({"bf16_tflops": 1}, "stage.devices.mine: lacks fp32_tflops, .*; give them, or like: h100"),
        ({"like": "mine"}, "stage.devices.mine.like=mine: must be another device: h100, h200, a100, cpu"),
        ({"like": ["h100"]}, r"stage.devices.mine.like=\['h100'\]: must be another device: h100, h200, a100, cpu"),
        ({"like": {"h100": 1}}, "stage.devices.mine.like={'h100': 1}: must be another device"),
        ({"like": "h100", 5: 3}, "stage.devices.mine.5=3: no such figure; known: attention"),
        ({"like": "h100", "matmull": 1}, "stage.devices.mine.matmull=1: no such figure; did you mean 'matmul'"),
        ({"like": "h100", "matmul": "high"}, "stage.devices.mine.matmul='high': must be a number"),
        ({"like": "h100", "matmul": 1.5}, "stage.devices.mine.matmul=1.5: is a share"),
        ({"like": "h100", "per_node": 2.5}, "stage.devices.mine.per_node=2.5: must be a whole number"),
        ({"like": "h100", "memory_gb_s": 0}, "stage.devices.mine.memory_gb_s=0: must be positive"),
        ({"like": "h200", "fp32_tflops": 0}, "stage.devices.mine.fp32_tflops=0: must be positive; 0, measured here"),
        ({"like": "h100", "memory_gb_s": float("nan")}, "stage.devices.mine.memory_gb_s=nan: must be positive"),
    ],
)
def test_a_figure_that_cannot_be_is_one_line_whichever_device_is_asked_for(own: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        device_of({**KNOWN, "mine": own}, "h100", True)


def test_a_device_that_is_not_there_is_one_line_with_how_to_add_it() -> None:
    with pytest.raises(ConfigError, match=r"stage.device=b200 is not there; use one of h100.*'\+stage.devices.b200={"):
        device_of(KNOWN, "b200", True)


def test_ranks_of_one_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_device.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [threads_of_a_rank(ranks) for ranks in (1, 2, 8, 16)] == [(8, 1.0), (4, 1.0), (1, 1.0), (1, 0.5)]
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert [threads_of_a_rank(ranks) for ranks in (1, 4, 8)] == [(2, 1.0), (2, 1.0), (2, 0.5)]


def test_what_is_measured_is_a_ranks_own_and_leaves_threads_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_num_threads()
    speed, said = measured_tflops(False, size=64, seconds=0.0)
    assert speed > 0 and said.startswith("measured") and torch.get_num_threads() == before
    asked = []
    monkeypatch.setattr(plan_device, "measured_tflops", lambda half, ranks: asked.append(ranks) or (3.0, "measured"))
    for ranks, nodes in ((1, None), (4, None), (4, 1)):  # two to a host, unless it is said
        device, _ = device_of(KNOWN, "cpu", False, ranks=ranks, nodes=nodes)
        assert device.peak(False) == 3e12 and device.sources["fp32_tflops"] == "measured"
    assert asked == [1, 2, 4]
    assert device_of({**KNOWN, "mine": {"like": "cpu", "fp32_tflops": 0}}, "mine", False)[0].peak(False) == 3e12
    assert device_of({**KNOWN, "cpu": {**KNOWN["cpu"], "fp32_tflops": 1}}, "cpu", False, ranks=4)[0].peak(False) == 1e12
