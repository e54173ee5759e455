"""data_prep's own settings: their names, types and defaults, and which of them decide what shards hold."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.records import dumps

CONF = Path(__file__).resolve().parent.parent / "conf" / "data_prep"  # of its own: `task` is a group of soratrain's
WEIGHTS = ("score.clip", "score.aesthetic", "score.text")
PATHS = ("input", "output", "license", "captions", "captions_columns.*", "validate.report", *WEIGHTS)  # any values
TASKS = ("build", "index", "score", "select", "repack", "validate", "report")
ENGINES = ("local", "slurm")
PRESETS = ["ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow"]
FORM = 8  # of what the steps do: a change that alters shards from the same input raises it


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
class ScoreConfig:
    """The trained models that give scores, by the paths of their weights, and how they run."""

    clip: str | None = None
    aesthetic: str | None = None
    text: str | None = None
    frames: int = 3
    batch: int = 32
    device: str = "auto"


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
    min_aesthetic: float | None = None
    max_text_area: float | None = None
    duplicates: str = "drop"


@dataclass
class RepackConfig:
    """In which order samples go into new shards."""

    shuffle: int | None = None


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
    score: ScoreConfig = field(default_factory=ScoreConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    repack: RepackConfig = field(default_factory=RepackConfig)
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
        if self.task in ("select", "repack"):
            own = ("select",) if self.task == "select" else ("shards", "repack")
            return {key: settings[key] for key in ("task", "input", *own)}
        unused = {"world": ("shots", "license")}.get(self.input, ("world",)) if self.task == "build" else ()
        for key in (*unused, "score", "select", "repack", "validate"):
            del settings[key]
        return settings | {"form": FORM}

    def hash(self) -> str:
        """Return the hash of `identity()`."""
        return hash_of(self.identity())


def hash_of(value: Any) -> str:
    """Return 16 hex digits that identify a plain value."""
    return hashlib.blake2b(dumps(value).encode(), digest_size=8).hexdigest()
