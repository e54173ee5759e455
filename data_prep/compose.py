"""data_prep's settings from the command line: composed by Hydra, checked, one clear line for what is wrong."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass

from data_prep.schema import CONF, ENGINES, PRESETS, TASKS, PrepConfig
from soratrain.errors import ConfigError


def keys_of(schema: type, prefix: str = "") -> list[str]:
    """Return every dotted key of a dataclass, groups before their members."""
    keys = []
    for item in fields(schema):
        keys.append(prefix + item.name)
        default = item.default_factory() if callable(item.default_factory) else None
        if is_dataclass(default):
            keys += keys_of(type(default), f"{prefix}{item.name}.")
    return keys


def check_keys(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that is not `key=value` with a key that exists."""
    known = keys_of(PrepConfig)
    groups = {key.split(".")[0] for key in known if "." in key}
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r} is not key=value; for example: input=videos output=data/videos")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
            raise ConfigError(f"unknown key {key!r}; {hint}")
        if key in groups:
            inside = ", ".join(name for name in known if name.startswith(f"{key}."))
            raise ConfigError(f"{key}={value}: {key} is a group; set one of {inside}")


def compose(overrides: Sequence[str]) -> PrepConfig:
    """Return the settings that `overrides` (already quoted for Hydra) ask for, checked.

    Raises:
        ConfigError: an unknown key, a value of the wrong type or out of range, or a missing input.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    check_keys(overrides)
    ConfigStore.instance().store("data_prep_schema", PrepConfig)
    try:
        with initialize_config_dir(str(CONF), version_base=None, job_name="data_prep"):
            composed = hydra_compose("data_prep", list(overrides))
        missing = OmegaConf.is_missing(composed, "input")
        if missing:
            composed.input = ""
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
        key = getattr(cause, "full_key", None) or getattr(error, "override", None)
        raise ConfigError(f"{f'{key}: ' if key else ''}{str(cause).splitlines()[0]}") from error
    assert isinstance(config, PrepConfig)
    return check(config)


def check(config: PrepConfig) -> PrepConfig:
    """Return `config` with its defaults filled in; raises ConfigError where a value cannot work."""
    if config.task not in TASKS:
        raise ConfigError(f"task={config.task} is not there; use one of {', '.join(TASKS)}")
    if not config.input:
        raise ConfigError("input is missing; give input=FOLDER, a glob, a list file, or input=world")
    if config.output is None and config.task in ("index", "score", "validate", "report"):
        config.output = config.input
    elif config.output is None and config.input == "world":
        config.output = "data/world"
    if not config.output:
        raise ConfigError("output is missing; name the folder for the shards, for example output=data/videos")
    given = config.captions is not None or any(asdict(config.captions_columns).values())
    if given and (config.task != "build" or config.input == "world"):
        raise ConfigError("captions= and captions_columns.* are for task=build with an input of files; leave them out")
    if config.task == "score":
        check_score(config)
    if config.workers != "auto" and not (config.workers.isdigit() and int(config.workers) > 0):
        raise ConfigError(f"workers={config.workers} must be auto or a number of at least 1")
    if config.engine not in ENGINES:
        raise ConfigError(f"engine={config.engine} is not there; use one of {', '.join(ENGINES)}")
    if config.validate.decode not in ("all", "sample", "none"):
        raise ConfigError(f"validate.decode={config.validate.decode} is not there; use all, sample or none")
    if config.select.duplicates not in ("drop", "keep"):
        raise ConfigError(f"select.duplicates={config.select.duplicates} is not there; use drop or keep")
    if config.video.preset not in PRESETS:
        raise ConfigError(f"video.preset={config.video.preset} is unknown; use one of {', '.join(PRESETS)}")
    limits = {
        "world.clips": (config.world.clips, 1, 10**9),
        "shots.threshold": (config.shots.threshold, 1, 255),
        "shots.min_content": (config.shots.min_content, 0, 255),
        "shots.min_seconds": (config.shots.min_seconds, 0, config.shots.max_seconds),
        "shots.max_seconds": (config.shots.max_seconds, 0.1, 3600),
        "shots.margin": (config.shots.margin, 0, 60),
        "shots.stride": (config.shots.stride or config.shots.max_seconds, config.shots.max_seconds, 86400),
        "video.crf": (config.video.crf, 0, 51),
        "video.gop": (config.video.gop, 1, 250),
        "shards.mb": (config.shards.mb, 1, 65536),
        "score.frames": (config.score.frames, 1, 64),
        "score.batch": (config.score.batch, 1, 65536),
        "slurm.jobs": (config.slurm.jobs, 1, 10_000),
        "slurm.cpus": (config.slurm.cpus, 1, 1024),
        "slurm.minutes": (config.slurm.minutes, 1, 60 * 24 * 365),
        "limits.seconds": (config.limits.seconds, 1, 86400),
        "limits.memory_gb": (config.limits.memory_gb, 0.5, 4096),
    }
    for key, (value, low, high) in limits.items():
        if not low <= value <= high:
            raise ConfigError(f"{key}={value} must lie between {low} and {high}")
    return config


def check_score(config: PrepConfig) -> None:
    """Raise ConfigError where no score is asked for, half of one, or one elsewhere than beside its shards."""
    given = config.score
    if config.output != config.input:
        raise ConfigError(f"output={config.output}: scores go into the manifest of input={config.input}; leave it out")
    if given.clip is None and given.aesthetic is None and given.text is None:
        raise ConfigError("no weights are given; name score.clip and score.aesthetic, or score.text, or all of them")
    if (given.clip is None) != (given.aesthetic is None):
        lacking = "clip" if given.clip is None else "aesthetic"
        raise ConfigError(f"score.{lacking} is missing: a head in score.aesthetic reads embeddings of a score.clip")
