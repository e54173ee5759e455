"""What a stage needs from others: is it there, and if not, which command makes it."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soratrain.compose import split_override
from soratrain.errors import DataError

log = logging.getLogger(__name__)

MAKERS = {"captions": "recaption", "vae": "vae", "captioner": "captioner", "latents": "encode", "dit": "dit"}
PASSED_ON = ("run", "seed", "machine", "upstream", "inputs", "vae", "captioner", "text", "logger")


def holds(key: str, path: Path) -> bool:
    """Return whether `path` holds a whole upstream result of kind `key`."""
    if key == "captions":
        return any(path.glob("captions/*/*.parquet")) or any(path.glob("*.parquet")) or any(path.glob("*/*.parquet"))
    if key in ("shards", "latents"):
        return (path / "dataset.json").is_file()
    return any((folder / f"{key}.safetensors").is_file() for folder in (path / "weights", path))


def ready(key: str, path: Path, *, own: bool) -> bool:
    """Return whether upstream `key` can be used; a folder of this same run (`own`) must be finished as well."""
    return holds(key, path) and (not own or key == "shards" or (path / "result.json").is_file())


def command(key: str, config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the command that makes upstream `key` for this run."""
    if key == "shards":
        clips = config["machine"]["world"]["clips"]
        return [
            sys.executable,
            "-m",
            "data_prep",
            "input=world",
            f"output={config['inputs']['shards']}",
            f"world.clips={clips}",
        ]
    passed = [item for item in overrides if split_override(item)[0].split(".")[0] in PASSED_ON]
    return [sys.executable, "-m", "soratrain", f"stage={MAKERS[key]}", *passed]


def shown(words: Sequence[str]) -> str:
    """Return a command as one would type it."""
    return " ".join(["python", *(shlex.quote(word) for word in words[1:])])


def ensure(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """See that everything `stage.needs` is there; what is missing is made, or named with the command that makes it.

    Raises:
        DataError: something is missing and may not, or could not, be made.
    """
    given = {split_override(item)[0] for item in overrides}
    for key in config["stage"]["needs"]:
        value = config["inputs"][key]
        if value is None:
            continue
        path, own = Path(value), f"inputs.{key}" not in given
        if ready(key, path, own=own):
            continue
        words = command(key, config, overrides)
        if not own and not (key == "shards" and value == "data/world"):
            if key == "shards":
                words = [sys.executable, "-m", "data_prep", "input=VIDEOS", f"output={value}"]
            raise DataError(f"inputs.{key}={value}: holds no {key}; give another path, or make it: {shown(words)}")
        if config["upstream"] == "fail":
            raise DataError(f"inputs.{key}={value}: missing or unfinished; make it first: {shown(words)}")
        log.info("%s is missing: making it with  %s", key, shown(words))
        code = subprocess.run(words, check=False).returncode
        if code in (130, -2):
            raise KeyboardInterrupt
        if code or not ready(key, path, own=own):
            raise DataError(f"inputs.{key}={value}: could not be made (exit code {code}); run it alone: {shown(words)}")
