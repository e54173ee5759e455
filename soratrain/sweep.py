"""Sweeps: Hydra's multirun, each job in a process and a folder of its own.

A job's folder is named by a hash of its overrides, so a sweep can be widened and run again: what is done is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig

from soratrain.children import run_child
from soratrain.compose import LIST_KEYS, TEXT_KEYS, check_overrides, split_override
from soratrain.errors import ConfigError
from soratrain.quoting import quote
from soratrain.run import detect_machine, global_rank, prepare
from soratrain.schema import CONF

METRICS = (
    "val_loss",
    "loss",
    "clips_per_s",
    "captions_per_s",
    "samples",
)  # the first one that a stage reports is what a sweeper minimises


def folder_hash(overrides: Sequence[str]) -> str:
    """Return the name of a job's folder, whatever the order of its overrides."""
    kept = sorted(item for item in overrides if split_override(item)[0] not in ("fresh", "upstream", "machine"))
    return hashlib.blake2b("\n".join(kept).encode(), digest_size=4).hexdigest()


def job(config: DictConfig) -> float:
    """Run one job of the sweep as the single-run command that anyone could type, and return its metric."""
    overrides = quote(list(HydraConfig.get().overrides.task), TEXT_KEYS, LIST_KEYS)
    out = Path("outputs") / config.run / config.stage.name / "sweep" / folder_hash(overrides)
    words = [sys.executable, "-m", "soratrain", *overrides, f"out={out}"]
    sys.stderr.write(f"sweep: {' '.join(overrides)} → {out}\n")
    code = run_child(words)
    if code:
        sys.exit(code)
    if global_rank():
        return 0.0  # the launcher takes the first rank's word, who alone writes the result
    result = json.loads((out / "result.json").read_text())
    metric = next((result[key] for key in METRICS if key in result), None)
    if metric is None:
        raise ConfigError(
            f"stage={config.stage.name}: reports none of {', '.join(METRICS)}, so it cannot be swept over"
        )
    return float(metric)


def combinations(overrides: Sequence[str], most: int = 256) -> list[list[str]]:
    """Return the first `most` single runs that a sweep of plain choices and ranges consists of."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override() and item.is_discrete_sweep()
        else [item.input_line or ""]
        for item in parsed
        if not item.is_hydra_override()
    ]
    return [list(run) for run in itertools.islice(itertools.product(*choices), most)]


def slurm_words(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a job array still has to be told, since all its jobs are of one size.

    Raises:
        ConfigError: the jobs differ in size, or nobody said how many devices a node has.
    """
    sizes = {(config["trainer"]["num_nodes"], config["trainer"]["devices"]) for config in configs}
    if len(sizes) > 1:
        raise ConfigError(
            "trainer.num_nodes, trainer.devices: the jobs of one SLURM array are of one size; sweep over them in"
            " separate commands"
        )
    if {devices for _, devices in sizes} != {"auto"}:
        return []
    strategies = {config["strategy"]["name"] for config in configs}
    if strategies != {"single"}:
        raise ConfigError(
            f"trainer.devices=auto with strategy={sorted(strategies)[-1]} under hydra/launcher=slurm: a login node"
            " cannot see how many GPUs a node has; give trainer.devices=NUMBER"
        )
    return ["trainer.devices=1"]


def sweep(overrides: Sequence[str]) -> int:
    """Run Hydra's multirun over `overrides` and return the exit code.

    Raises:
        ConfigError: an override that a single run would refuse, before the first job starts.
    """
    keys = [split_override(item)[0] for item in overrides]
    if "stage" not in keys:
        raise ConfigError("stage is missing; write -m stage=NAME …")
    if "out" in keys:
        raise ConfigError("out: a sweep names its jobs' folders itself; use run=NAME")
    check_overrides(overrides)
    words = list(overrides)
    if "machine" not in keys or "machine=auto" in words:
        machine, why = detect_machine(overrides)
        words = [item for item in words if item != "machine=auto"] + [f"machine={machine}"]
        sys.stderr.write(f"machine={machine} (auto: {why})\n")
    launched = [split_override(item)[1] for item in words if split_override(item)[0] == "hydra/launcher"]
    if launched and "upstream" not in keys:
        words.append("upstream=fail")  # jobs that run at once would all make the same thing
    configs = [prepare(run)[0] for run in combinations(words)]
    if "slurm" in launched:
        words += slurm_words(configs)
    sys.argv[1:] = ["--multirun", *words]
    hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    return 0
