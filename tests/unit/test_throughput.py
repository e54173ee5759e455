"""What the throughput monitor says is what was done."""

from __future__ import annotations

import re
import time
from functools import partial
from io import StringIO
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.progress import Progress
from soratrain.callbacks.throughput import Throughput, peak_of
from soratrain.distributed.phases import Phases
from soratrain.errors import ConfigError
from soratrain.models.dit import DiT
from soratrain.stages.plan_cost import forward_flops
from soratrain.stages.work import TrainingFlops

CPU = torch.device("cpu")


def test_a_row_says_rates_use_waiting_padding_and_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    phases = Phases()
    monitor = Throughput(phases, peak_tflops=0.001)
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    monitor.begin()
    for _ in range(4):
        monitor.note({"flops": torch.tensor(1e9), "tokens": torch.tensor(300.0)})
    phases.waited += 0.5
    monkeypatch.setattr(time, "monotonic", lambda: 108.0)
    row = monitor.row({"flops": 1e9, "tokens": 300.0, "samples": 6.0, "padded": 100.0}, left=10, device=CPU)
    memory = row.pop("memory_gib")
    assert row == pytest.approx(
        {
            "seconds": 2.0,
            "tokens_per_s": 150.0,
            "samples_per_s": 3.0,
            "mfu": 0.5,
            "data_wait": 0.0625,
            "padding": 0.25,
            "seconds_left": 20.0,
        }
    )
    assert 0.05 < memory < 24


def test_the_time_left_is_the_newest_row_s_and_before_the_first_that_of_its_steps_so_far(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = Throughput(Phases())
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    monitor.begin()
    assert monitor.seconds_left(9) is None
    monitor.note({})
    now[0] = 103.0
    assert monitor.seconds_left(9) == 27.0
    monitor.note({})
    now[0] = 104.0
    assert monitor.row({}, left=9, device=CPU)["seconds_left"] == monitor.seconds_left(9) == 18.0
    monitor.begin()
    monitor.note({})
    now[0] = 109.0  # a step that took long is of the next row
    assert monitor.seconds_left(8) == 16.0


ROW = {
    "loss": 0.51234, "seconds": 2.0, "tokens_per_s": 123_456.0, "samples_per_s": 3.0, "mfu": 0.431, "data_wait": 0.06,
    "padding": 0.121, "balance": 0.97, "memory_gib": 71.36, "seconds_left": 3760.0,
}  # fmt: skip
CHIEF = "1:02:40  loss 0.5123  123k tokens/s"


@pytest.mark.parametrize(
    ("width", "changed", "said"),
    [
        (80, {}, f"{CHIEF}  data 6 %  MFU 43 %"),
        (80, {"data_wait": 0.01}, f"{CHIEF}  MFU 43 %  71.4 GiB"),
        (60, {}, CHIEF),
        (120, {}, f"{CHIEF}  data 6 %  MFU 43 %  71.4 GiB  bal 97 %  pad 12 %"),
        (120, {"mfu": None, "balance": None, "padding": 0.0}, f"{CHIEF}  data 6 %  71.4 GiB"),
    ],
)
def test_the_bar_shows_on_one_line_what_fits_the_chief_things_first(
    width: int, changed: dict[str, float | None], said: str
) -> None:
    metrics = Metrics(Path("unused.csv"), every=10)
    metrics.row = {key: value for key, value in (ROW | changed).items() if value is not None}
    metrics.throughput.seconds = metrics.row["seconds"]
    progress = Progress(metrics, title="dit")
    progress.console = Console(width=width, force_terminal=True, file=StringIO(), color_system=None)
    progress.step = 120
    progress.open(2000)
    progress.on_step(SimpleNamespace(is_global_zero=True), SimpleNamespace(max_steps=2000))
    progress.stop()
    shown = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]", "", progress.console.file.getvalue())
    line = [line for line in re.split(r"[\r\n]+", shown) if line.strip()][-1].rstrip()
    assert " 120/2000 " in line and line.endswith(said) and len(line) <= width


def test_balance_is_the_mean_work_by_that_of_the_most_loaded_rank_step_by_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monitor = Throughput(Phases())
    monitor.begin()
    monkeypatch.setattr(monitor, "gathered", lambda values, device: [[0.0, 1.0, 4.0, 2.0], [0.0, 2.0, 2.0, 4.0]])
    row = monitor.row({}, left=0, device=CPU)
    assert row["balance"] == pytest.approx((3 + 3) / (4 + 4)) and "mfu" not in row


def test_known_gpus_have_their_own_peak_and_a_cpu_has_none() -> None:
    assert peak_of("NVIDIA H100 80GB HBM3") == 989.0 and peak_of("NVIDIA H100 PCIe") == 756.0
    assert peak_of("NVIDIA A100-SXM4-80GB") == 312.0
    assert peak_of("NVIDIA A10G") == 70.0 and peak_of("NVIDIA A40") == 149.7
    assert peak_of("NVIDIA L4") == 121.0 and peak_of("NVIDIA L40S") == 362.0 and peak_of("Voodoo 2") is None
    for name, peak in (
        ("H100 NVL", 835.0),
        ("H200", 989.0),
        ("H200 NVL", 835.0),
        ("GH200 480GB", 989.0),
        ("A10", 125.0),
    ):
        assert peak_of(f"NVIDIA {name}") == peak
    assert peak_of("NVIDIA H100 80GB HBM3 MIG 1g.10gb") is None and peak_of("NVIDIA A100-PCIE-40GB") == 312.0
    assert peak_of("NVIDIA GeForce RTX 3090 Ti") is peak_of("NVIDIA GeForce RTX 4090 D") is None
    for part in ("GRID A100-10C", "NVIDIA A40-48Q", "NVIDIA A10-24A", "NVIDIA A40-2B4", "NVIDIA A100-1-5CME"):
        assert peak_of(part) is None
    for other in ("NVIDIA RTX A4000", "NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU"):
        assert peak_of(other) is None
    with pytest.raises(ConfigError, match="trainer.peak_tflops=0"):
        Throughput(Phases(), 0)


def test_training_is_counted_as_three_forward_passes_of_the_same_pack() -> None:
    factory = partial(DiT, channels=4, dim=64, depth=3, num_heads=2, text_dim=8, mlp_ratio=4.0)
    lengths, words = [320, 64, 16], [3, 1, 5]
    assert TrainingFlops(factory)(lengths, words) == 3 * forward_flops(factory(), lengths, words)[0]
