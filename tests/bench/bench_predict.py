"""What stage=plan says of a step's time beside what was measured: here, on CPUs, and by others, on many GPUs.

Published runs, each by repository, file and commit; what is foretold is of their shapes under ZeRO-3 with weights in
bf16, uncompiled:
- NVIDIA-NeMo/DFM, docs/performance-summary.md (0c23efe), "NeMo Automodel Pre-Training Performance": Wan 2.1 14B, 37,440
  tokens, FSDP alone, on 8 H100 175.88 TFLOP/s a GPU, on 64 228.85. Its recipe computes each block again
  (dfm/src/automodel/recipes/train.py, 04ae88a: activation_checkpointing=True). Messages are not what is left of its
  gap: computing hides all that are foretold on 64 GPUs, at a tenth of the bandwidth too, and 8 GPUs were slower.
- pytorch/torchtitan, docs/performance.md (0413369), "Llama 3 performance numbers": 64 A100, FSDP2, one text of 8,192
  tokens a GPU: 8B with selective recomputation by operator 2,973 tokens/s a GPU, 70B with all of it 331.
- pytorch/torchtitan, benchmarks/llama3_h100_202412_torchtitan.md (31a17bf), tables 1 and 3: Llama 3.1 8B, FSDP, two
  texts of 8,192 tokens a GPU, selective recomputation, uncompiled: 5,762 tokens/s a GPU on 8 H100, 5,605 on 128; cards
  of 2.4 TB/s and 500 W, whose own peak is not said.
- foundation-model-stack/fms-fsdp, README.md (0d31998), Llama 2 on 128 A100, 4,096 tokens: 7B, two texts a GPU, nothing
  computed again, 3,760 tokens/s a GPU (sharded within nodes only); 70B, six texts, all of it, 380.

Attention of Llama is causal: half is computed. torchtitan's selective recomputation by operator repeats every second
product of a block: of seven (two of D² and two of D²/4 around attention, three of 3.5 D²) those numbered 2, 4 and 6,
4.75 of 13 D²; a third of all with the head's, which is not repeated.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
TITLE = "Seconds of a training step, foretold by stage=plan and measured"
STEPS, WARM = 30, 6
BF16 = 2


@dataclass(frozen=True)
class Run:
    """A published run of a transformer: its shape, and what a GPU did."""

    name: str
    device: str
    ranks: int
    parameters: float  # of the products
    dim: int
    depth: int
    mlp_ratio: float
    length: int
    texts: int
    again: tuple[float, float]
    tokens_per_s: float = 0.0
    tflops: float = 0.0
    computed: float = 1.0  # of attention's pairs
    cross: int = 0  # tokens that are read across

    @property
    def flops(self) -> tuple[float, float]:
        """Operations of a step forwards: of products, and of attention as far as it is computed."""
        pairs = self.length**2 * self.computed + self.length * self.cross
        return 2 * self.parameters * self.length * self.texts, 4 * self.depth * self.dim * pairs * self.texts

    @property
    def seconds(self) -> float:
        """Of a step, as published; model operations are counted as their source does."""
        if self.tokens_per_s:
            return self.length * self.texts / self.tokens_per_s
        return 3 * sum(self.flops) / (self.tflops * 1e12)


WAN = {"parameters": 14e9, "dim": 5120, "depth": 40, "mlp_ratio": 2.7, "length": 37_440, "texts": 1, "cross": 512}
LLAMA = {"mlp_ratio": 3.5, "length": 8192, "computed": 0.5}
LLAMA_8B = {"parameters": 7.5e9, "dim": 4096, "depth": 32, "again": (0.34, 0.0), **LLAMA}
LLAMA_70B = {"parameters": 69.5e9, "dim": 8192, "depth": 80, "again": (1, 1), **LLAMA}
LLAMA_2_7B = {"parameters": 6.6e9, "dim": 4096, "depth": 32, "again": (0, 0), **LLAMA, "mlp_ratio": 2.7, "length": 4096}
LLAMA_2_70B = {**LLAMA_70B, "parameters": 68.7e9, "length": 4096}
PUBLISHED = (
    Run("Wan-14B, FSDP alone", "h100", 8, again=(1, 1), tflops=175.88, **WAN),
    Run("Wan-14B, FSDP alone", "h100", 64, again=(1, 1), tflops=228.85, **WAN),
    Run("Llama 3 8B, FSDP2", "a100", 64, texts=1, tokens_per_s=2973, **LLAMA_8B),
    Run("Llama 3 70B, FSDP2", "a100", 64, texts=1, tokens_per_s=331, **LLAMA_70B),
    Run("Llama 3.1 8B, FSDP2", "h100_500w", 8, texts=2, tokens_per_s=5762, **LLAMA_8B),
    Run("Llama 3.1 8B, FSDP2", "h100_500w", 128, texts=2, tokens_per_s=5605, **LLAMA_8B),
    Run("Llama 2 7B, FSDP in nodes", "a100", 128, texts=2, tokens_per_s=3760, **LLAMA_2_7B),
    Run("Llama 2 70B, FSDP", "a100", 128, texts=6, tokens_per_s=380, **LLAMA_2_70B),
)


def published() -> list[dict[str, str]]:
    """Return a row for each published run."""
    from soratrain.distributed.memory import dit_activations
    from soratrain.distributed.options import StrategyOptions
    from soratrain.stages.plan_device import device_of
    from soratrain.stages.plan_time import Work, step_time

    devices = yaml.safe_load((ROOT / "conf" / "stage" / "plan.yaml").read_text())["stage"]["devices"]
    devices["h100_500w"] = {"like": "h100", "memory_gb_s": 2400}
    rows = []
    for run in PUBLISHED:
        products, attention = run.flops
        sizes = {"dim": run.dim, "depth": run.depth, "mlp_ratio": run.mlp_ratio}
        kept = dit_activations(tokens=run.length * run.texts, itemsize=BF16, **sizes)
        work = Work(
            products=products,
            attention=attention,
            again=run.again,
            kept=kept,
            blocks=run.depth,
            parameters=int(run.parameters),
        )
        device, nodes = device_of(devices, run.device, True, ranks=run.ranks)
        options = StrategyOptions(name="zero3", weights="bf16")
        found = step_time(work, options, device, ranks=run.ranks, nodes=nodes, half=True)
        share = 3 * (products + attention) / (run.seconds * device.peak(True))
        name = f"{run.name}, {run.ranks} {run.device.upper().replace('_', ' of ')}"
        rows.append(row(name, found.total, [run.seconds], found.utilisation, share))
    return rows


def row(name: str, foretold: float, seconds: list[float], told: float, share: float) -> dict[str, str]:
    """Return a row of the table."""
    spread = f" ({min(seconds):.3g}–{max(seconds):.3g})" if len(seconds) > 1 else ""
    return {
        "run": name,
        "foretold, s": f"{foretold:.3g}",
        "measured, s": f"{median(seconds):.3g}{spread}",
        "measured / foretold": f"{median(seconds) / foretold:.2f}",
        "of the peak, foretold": f"{told:.1%}",
        "measured": f"{share:.1%}",
    }


def train(folder: Path, words: list[str], ranks: int) -> list[float]:
    """Return the seconds of each step of a run here."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "soratrain", "stage=dit", *words, f"trainer.max_steps={STEPS}"]
    command += [f"out={folder}", f"trainer.devices={ranks}", "trainer.log_every=1", "fresh=true"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    rows = (folder / "metrics.csv").read_text().splitlines()
    place = rows[0].split(",").index("seconds")
    return [float(line.split(",")[place]) for line in rows[1 + WARM :]]


def plan(folder: Path, words: list[str], ranks: int) -> dict[str, Any]:
    """Return what stage=plan says of the same run."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "soratrain", "stage=plan", "target=dit", *words, f"trainer.max_steps={STEPS}"]
    command += [f"out={folder}", f"stage.job.ranks={ranks}"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    return json.loads((folder / "plan.json").read_text())["time"]


def data(folder: Path) -> tuple[Path, Path]:
    """Write clips of two sizes, and latents of the same sizes as the tiny VAE's; return both folders."""
    from data_tiny import write_clips, write_latents

    shapes = [(48, 64, 9)] * 64 + [(64, 48, 17)] * 32
    made = write_clips(folder / "shards", shapes), write_latents(folder / "latents", shapes, channels=16)
    for place in made:
        (place / "dataset.json").write_text("{}")  # what says that they are whole
    return made


def here() -> list[dict[str, str]]:
    """Return a row for each strategy that two cores can train under; a rank has one thread."""
    import torch

    from soratrain.stages.plan_device import measured_tflops

    torch.set_num_threads(1)
    peak = max(measured_tflops(False)[0] for _ in range(10))  # others may be at work: one peak for all rows
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        shards, made = data(folder)
        for strategy, ranks in (("single", 1), ("ddp", 2), ("zero2", 2), ("zero3", 2)):
            words = ["machine=laptop", f"strategy={strategy}", "optimizer=adamw", "upstream=fail", "validation=none"]
            words += ["inputs.captions=null"]
            words += ["trainer.precision=32-true", "machine.precision=32-true", "trainer.checkpoint_every=0"]
            device = f"stage.devices.cpu.fp32_tflops={peak}"
            told = plan(folder / "plan" / strategy, [*words, device, f"inputs.shards={shards}"], ranks)
            took = train(folder / strategy, [*words, f"inputs.latents={made}"], ranks)
            share = told["utilisation"] * told["step_seconds"] / median(took)
            name = f"dit=tiny here, {strategy}, {ranks} process{'es' if ranks > 1 else ''}"
            rows.append(row(name, told["step_seconds"], took, told["utilisation"], share))
    return rows


def measure() -> list[dict[str, str]]:
    """Return the table."""
    return [*published(), *here()]
