"""Sweeps: Hydra's multirun, each job in a process and a folder of its own.

A job's folder is named by a hash of its overrides, so a sweep can be widened and run again: what is done is skipped.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from soratrain import again, outputs, upstream
from soratrain.children import ended_by, run_child
from soratrain.compose import LIST_KEYS, TEXT_KEYS, check_overrides, launcher_node, one_line, split_override
from soratrain.errors import ConfigError, DataError
from soratrain.quoting import quote, quote_value
from soratrain.run import detect_machine, prepare
from soratrain.schema import CONF
from soratrain.sweep_runs import compared, record

CHECKED = 256  # runs of a sweep are checked before the first of them starts
HIDDEN = ("out", "upstream", "machine")  # words that sweep() itself may have added
failed: list[str] = []  # the runs of this process's sweep that did not end well, each with why


def folder_hash(overrides: Sequence[str]) -> str:
    """Return the name of a job's folder, whatever the order of its overrides."""
    kept = sorted(item for item in overrides if split_override(item)[0] not in ("fresh", "upstream", "machine"))
    return hashlib.blake2b("\n".join(kept).encode(), digest_size=4).hexdigest()


def folder_of(run: object, stage: str) -> Path:
    """Return where the runs of a sweep lie."""
    return Path("outputs") / str(run) / stage / "sweep"


@dataclass(frozen=True)
class Run:
    """One run of a sweep, or the only one.

    Attributes:
        words: of its command, after `python -m soratrain`.
        out: its folder.
        given: those of the words that make it, as they were given.
        fresh: it starts over.
    """

    words: tuple[str, ...]
    out: Path
    given: tuple[str, ...]
    fresh: bool

    @property
    def called(self) -> str:
        """Its overrides in one line."""
        return " ".join(self.given)

    @property
    def done(self) -> bool:
        return (self.out / "result.json").is_file()


def run_of(overrides: Sequence[str], config: DictConfig) -> Run:
    """Return the run of some overrides, as the command that anyone could type."""
    given = [item for item in overrides if not split_override(item)[0].startswith(("hydra.", "hydra/"))]
    words = quote(given, TEXT_KEYS, LIST_KEYS)
    shown = tuple(item for item in words if split_override(item)[0] not in HIDDEN)
    if "out" in dict(map(split_override, words)):
        out = Path(str(config.out))
    else:
        out = folder_of(config.run, config.stage.name) / folder_hash(words)
        words.append(f"out={out}")
    return Run(tuple(words), out, shown, bool(config.fresh))


def job(config: DictConfig) -> float:
    """Run one job of the sweep in a process of its own and return its metric, NaN where it fails."""
    run = run_of(list(HydraConfig.get().overrides.task), config)
    sys.stderr.write(f"sweep: {run.called} → {run.out}\n")
    record(run.out, run.given, here=True)
    code = run_child([sys.executable, "-m", "soratrain", *run.words])
    if code:
        record(run.out, run.given, here=True, code=code)
        failed.append(f"{run.called} ({ended_by(code)}; why stands above)")
        return math.nan
    return metric_of(run.out)


def metric_of(out: Path) -> float:
    """Return what a sweep compares finished runs by; NaN of one that has no such figure."""
    return compared(json.loads((out / "result.json").read_text()))[1]


def combinations(overrides: Sequence[str]) -> tuple[Iterator[list[str]], int]:
    """Return the single runs that a sweep of plain choices and ranges consists of, and how many there are."""
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    choices = [
        [f"{item.get_key_element()}={value}" for value in item.sweep_string_iterator()]
        if item.is_sweep_override() and item.is_discrete_sweep()
        else [item.input_line or ""]
        for item in parsed
        if not item.is_hydra_override()
    ]
    return map(list, itertools.product(*choices)), math.prod(map(len, choices))


def slurm_words(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what a job array still has to be told, since all its jobs are of one size.

    Raises:
        ConfigError: the jobs differ in size or in `requeues`, or nobody said how many devices a node has.
    """
    sizes = {(config["trainer"]["num_nodes"], config["trainer"]["devices"]) for config in configs}
    if len(sizes) > 1:
        raise ConfigError(
            "trainer.num_nodes, trainer.devices: the jobs of one SLURM array are of one size; sweep over them in"
            " separate commands"
        )
    if len({config["requeues"] for config in configs}) > 1:
        raise ConfigError("requeues: is one number for all jobs of a SLURM array; give one value, not several")
    alone = {config["strategy"]["name"] for config in configs} == {"single"}
    if alone and any(nodes > 1 or devices not in (1, "auto") for nodes, devices in sizes):
        nodes, devices = next(iter(sizes))
        raise ConfigError(
            f"trainer.num_nodes={nodes} trainer.devices={devices} with strategy=single: use strategy=ddp, zero2 or"
            " zero3"
        )
    without = any(config["trainer"]["accelerator"] == "cpu" for config in configs)
    words = ["hydra.launcher.gpus_per_node=null"] if without else []
    if {devices for _, devices in sizes} != {"auto"}:
        return words
    strategies = {config["strategy"]["name"] for config in configs}
    if strategies != {"single"}:
        raise ConfigError(
            f"trainer.devices=auto with strategy={sorted(strategies)[-1]} under hydra/launcher=slurm: a login node"
            " cannot see how many GPUs a node has; give trainer.devices=NUMBER"
        )
    return [*words, "trainer.devices=1"]


def sweep(overrides: Sequence[str]) -> int:
    """Run Hydra's multirun over `overrides` and return the exit code.

    Raises:
        ConfigError: an override that a single run would refuse, before the first job starts.
    """
    keys = [split_override(item)[0] for item in overrides]
    if "stage" not in keys:
        raise ConfigError("stage is missing; write -m stage=NAME …")
    if "out" in keys and combinations(overrides)[1] > 1:
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
    found, count = combinations(words)
    runs = list(itertools.islice(found, CHECKED))
    if count > len(runs):
        sys.stderr.write(
            f"sweep: of {count} runs the first {CHECKED} are checked now, each of the others as it starts\n"
        )
    configs = [prepare(run)[0] for run in runs]
    for folder in {folder_of(config["run"], config["stage"]["name"]) for config in configs}:
        outputs.check_writable(folder)
    if count == 1 and "out" not in keys and not any(key.startswith("hydra.sweeper") for key in keys):
        words.append(f"out={quote_value(configs[0]['out'])}")  # no sweep: the run that it is without -m
    if "slurm" in launched:
        from soratrain import launcher

        words = [*slurm_words(configs), *words]  # what is asked for comes last, and wins
        hydra_words = [item for item in words if split_override(item)[0].startswith(("hydra.", "hydra/"))]
        launcher.prepared(launcher_node([*runs[0], *slurm_words(configs), *hydra_words]))
        for run, config in zip(runs, configs, strict=True):
            own = [word for word in run if word in words or split_override(word)[0] != "seed"]  # not a swept one
            upstream.ensure(config, own)  # before they wait in a queue for it
    sys.argv[1:] = ["--multirun", *words]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # raise what goes wrong, so that it is said like anything else
    failed.clear()
    again.began(fresh=any(config["fresh"] for config in configs))  # the runs themselves are other processes' work
    try:
        hydra.main(config_path=str(CONF), config_name="config", version_base="1.3")(job)()
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(one_line(error)) from error
    except OSError as error:
        raise DataError(f"{error.filename or 'sweep'}: {error.strerror or error}") from error
    if failed:
        which = f"{len(failed)} of {count} runs" if count > 1 else "the run"
        raise DataError(f"{which} failed: {'; '.join(failed[:4])}; the same command does what is left")
    return 0
