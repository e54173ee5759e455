"""The trained models that give scores: which the settings ask for, what tells them apart, what all have in common."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from data_prep.schema import ScoreConfig, hash_of
from soratrain.errors import ConfigError

CLIP_FILES = ("config.json", "preprocessor_config.json", "*.safetensors")  # all that decides what CLIP makes


class Rater(Protocol):
    """A loaded model; `prepare` may be called from many threads, `rate` from one."""

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """Return what the model takes of a picture, uint8 RGB `[H, W, 3]`."""

    def rate(self, prepared: Sequence[np.ndarray]) -> list[float]:
        """Return the score of each picture."""


@dataclass(frozen=True)
class Model:
    """A score that is asked for.

    Attributes:
        name: of the score.
        record: what dataset.json says of it: a hash of the weights, from how many frames, and how the files are named.
        load: loads the model; raises ConfigError where the files are not what they should be.
    """

    name: str
    record: dict[str, Any]
    load: Callable[[], Rater]

    @property
    def identity(self) -> dict[str, Any]:
        """What decides the score: names of files do not."""
        return {key: value for key, value in self.record.items() if key != "from"}

    def made(self, record: dict[str, Any] | None) -> bool:
        """Return whether a record in dataset.json is of this very model."""
        return record is not None and self.identity.items() <= record.items()


def models_of(settings: ScoreConfig) -> list[Model]:
    """Return the models whose weights are given. Raises ConfigError where a file is not there."""
    models = []
    if settings.clip is not None and settings.aesthetic is not None:
        clip, head = Path(settings.clip), Path(settings.aesthetic)
        weights = [path for name in CLIP_FILES for path in sorted(clip.glob(name))]
        if not any(path.suffix == ".safetensors" for path in weights):
            raise ConfigError(f"score.clip={clip}: is no folder that holds *.safetensors, as Hugging Face saves a CLIP")

        def aesthetic() -> Rater:
            from data_prep.clip_score import Aesthetic

            return Aesthetic(clip, head, settings.device)

        told = record_of(settings, {"clip": weights, "aesthetic": [head]}, {"clip": clip, "aesthetic": head})
        models.append(Model("aesthetic", told, aesthetic))
    if settings.text is not None:
        file = Path(settings.text)

        def text_area() -> Rater:
            from data_prep.text_area import TextArea

            return TextArea(file)

        models.append(Model("text_area", record_of(settings, {"text": [file]}, {"text": file}), text_area))
    return models


def record_of(settings: ScoreConfig, files: dict[str, list[Path]], named: dict[str, Path]) -> dict[str, Any]:
    """Return the record of a model from the files of each setting."""
    weights = hash_of({key: digest(f"score.{key}", paths) for key, paths in files.items()})
    return {
        "weights": weights,
        "frames": settings.frames,
        "from": {key: path.resolve().name for key, path in named.items()},
    }


def digest(key: str, paths: Iterable[Path]) -> list[str]:
    """Return the SHA-256 of each file. Raises ConfigError where one is not there."""
    found = []
    for path in paths:
        try:
            with open(path, "rb") as file:
                found.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise ConfigError(f"{key}={path} cannot be read: {error.strerror}; name a file") from error
    return found
