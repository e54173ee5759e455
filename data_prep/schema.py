"""data_prep's own settings: composed by Hydra, checked against a dataclass, one clear line for what is wrong."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from data_prep.records import dumps
from soratrain.errors import ConfigError

CONF = Path(__file__).resolve().parent.parent / "conf"
PATHS = ("input", "output", "license", "captions", "captions_columns.*", "validate.report")  # values may be anything
TASKS = ("build", "index", "select", "validate", "report")
ENGINES = ("local", "slurm")
PRESETS = ["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
FORM = 3  # of what the steps do: a change that alters shards from the same input raises it


@dataclass
class WorldConfig:
    """The embedded world: which preset, how many clips, and the seed of all of them."""

    preset: str = "demo"
    clips: int = 2400
    seed: int = 0


@dataclass
class CaptionsColumns:
    """Which columns of the table of captions hold what; null is by their names."""

    file: str | None = None
    text: str | None = None
    type: str | None = None
    lang: str | None = None


@dataclass
class ShotsConfig:
    """Where clips begin and end; times in seconds."""

    detect: bool = True
    threshold: float = 3.0
    min_content: float = 15.0
    min_seconds: float = 0.4
    max_seconds: float = 20.0
    margin: float = 0.0
    stride: float | None = None


@dataclass
class VideoConfig:
    """How clips are encoded."""

    crf: int = 18
    preset: str = "veryfast"
    gop: int = 16


@dataclass
class ShardsConfig:
    """How shards are cut."""

    mb: int = 256


@dataclass
class LimitsConfig:
    """What one file may take."""

    seconds: float = 60.0
    memory_gb: float = 4.0


@dataclass
class SlurmConfig:
    """The job array of engine=slurm; null leaves a setting to the cluster."""

    jobs: int = 8
    cpus: int = 4
    minutes: int = 240
    mem_gb: int | None = None
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    setup: list[str] = field(default_factory=list)


@dataclass
class SelectConfig:
    """Thresholds on stored scores; null asks for nothing."""

    min_seconds: float | None = None
    max_seconds: float | None = None
    min_side: int | None = None
    max_aspect: float | None = None
    min_fps: float | None = None
    max_black: float | None = 0.5
    max_static: float | None = 0.9
    max_letterbox: float | None = None
    max_blur: float | None = None
    min_motion: float | None = None
    max_motion: float | None = None
    duplicates: str = "drop"


@dataclass
class ValidateConfig:
    """What task=validate decodes, and where it lists all problems."""

    decode: str = "sample"
    report: str | None = None


@dataclass
class PrepConfig:
    """Everything data_prep can be told."""

    task: str = "build"
    input: str = "???"
    output: str | None = None
    fresh: bool = False
    workers: str = "auto"
    engine: str = "local"
    license: str = ""
    captions: str | None = None
    captions_columns: CaptionsColumns = field(default_factory=CaptionsColumns)
    world: WorldConfig = field(default_factory=WorldConfig)
    shots: ShotsConfig = field(default_factory=ShotsConfig)
    video: VideoConfig = field(default_factory=VideoConfig)
    shards: ShardsConfig = field(default_factory=ShardsConfig)
    limits: LimitsConfig = field(default_factory=LimitsConfig)
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    validate: ValidateConfig = field(default_factory=ValidateConfig)

    @property
    def folder(self) -> Path:
        """The output folder."""
        assert self.output is not None
        return Path(self.output)

    @property
    def processes(self) -> int:
        """How many processes work."""
        return len(os.sched_getaffinity(0)) if self.workers == "auto" else int(self.workers)

    def identity(self) -> dict[str, Any]:
        """Return the settings that decide what the shards hold, as plain values.

        What a table of captions says of the input's files is part of what the input holds, whatever the table is named.
        """
        settings = asdict(self)
        for key in ("output", "fresh", "workers", "engine", "limits", "slurm", "captions", "captions_columns"):
            del settings[key]
        if self.task == "select":
            return {key: settings[key] for key in ("task", "input", "select")}
        unused = {"world": ("shots", "license")}.get(self.input, ("world",)) if self.task == "build" else ()
        for key in (*unused, "select", "validate"):
            del settings[key]
        return settings | {"form": FORM}

    def hash(self) -> str:
        """Return the hash of `identity()`."""
        return hash_of(self.identity())


def hash_of(value: Any) -> str:
    """Return 16 hex digits that identify a plain value."""
    return hashlib.blake2b(dumps(value).encode(), digest_size=8).hexdigest()


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
    if config.output is None and config.task in ("index", "validate", "report"):
        config.output = config.input
    elif config.output is None and config.input == "world":
        config.output = "data/world"
    if not config.output:
        raise ConfigError("output is missing; name the folder for the shards, for example output=data/videos")
    given = config.captions is not None or any(asdict(config.captions_columns).values())
    if given and (config.task != "build" or config.input == "world"):
        raise ConfigError("captions= and captions_columns.* are for task=build with an input of files; leave them out")
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
