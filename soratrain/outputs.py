"""A stage's output folder: who owns it, whether it is finished, and what the same command may do to it.

outputs/<run>/<stage>/<experiment or base>/
    config.yaml    the resolved config that the folder belongs to
    result.json    written last: the stage is finished
    log.txt        what was said
    checkpoints/ weights/ metrics.csv samples/ …   as the stage makes them
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from data_prep.kinds import kind_of
from soratrain import again
from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError, DataError

# What decides a stage's result: its own node, into which all that it uses is resolved, and how it is trained.
MATTERS = ("stage", "trainer", "seed", "init")
# Of these, what changes where or how fast it runs and what it says, not what it learns.
FREE = (
    "trainer.strategy",
    "trainer.logger",
    "trainer.devices",
    "trainer.num_nodes",
    "trainer.sequence",
    "trainer.accelerator",
    "trainer.log_every",
    "trainer.checkpoint_every",
    "trainer.keep",
    "trainer.keep_best",
    "trainer.checkpoint_async",
    "trainer.elastic",
    "trainer.max_shard_gb",
    "trainer.export",
    "trainer.compile",
    "trainer.stall_minutes",
    "trainer.peak_tflops",
    "stage.module.dit.recompute",
    "stage.module.text.features",
    "trainer.validation",
    "trainer.previews",
    "stage.data.workers",
    "stage.data.prefetch",
    "stage.data.cache",
    "stage.job.workers",
    "stage.job.sequence",
    "stage.job.remote",
    "stage.job.max_bad",
    "stage.job.engine.url",
    "stage.job.engine.key_env",
    "stage.job.engine.batch_size",
    "stage.job.engine.pixels_per_batch",
    "stage.job.engine.concurrency",
    "stage.job.engine.timeout_s",
    "stage.job.engine.retries",
    "stage.job.engine.backoff_s",
    "stage.job.engine.offline",
)
OF_A_CLAIM = ("config.yaml", "upstream.yaml", "log.txt")  # what is in a folder before anything is made
OF_A_JOB = ("slurm.json", "slurm-start.json", "sweep.json", "logs")  # who works there, and what its processes say


def flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    """Return nested mappings as dotted keys."""
    if not isinstance(node, Mapping) or not node:
        return {prefix: node}
    return {
        key: value
        for name, child in node.items()
        for key, value in flatten(child, f"{prefix}.{name}" if prefix else str(name)).items()
    }


def matters(key: str) -> bool:
    """Return whether `key` must be the same between two starts of one run."""
    inside = [any(key == name or key.startswith(name + ".") for name in names) for names in (MATTERS, FREE)]
    return inside[0] and not inside[1]


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key: old → new` for every key that matters and differs; what a stage takes from another key is that key.

    So `stage.module.max_steps` is not named where `trainer.max_steps` is, which a user gives.
    """
    before, after = flatten(old), flatten(new)
    keys = [key for key in sorted(before.keys() | after.keys()) if matters(key) and before.get(key) != after.get(key)]

    def change(key: str) -> tuple[str, Any, Any]:
        return key.rpartition(".")[2], before.get(key), after.get(key)

    given = [change(key) for key in keys if not key.startswith("stage.")]
    keys = [key for key in keys if not key.startswith("stage.") or change(key) not in given]
    return [f"{key}: {before.get(key)!r} → {after.get(key)!r}" for key in keys]


def stored_config(out: Path) -> dict[str, Any] | None:
    """Return the config that `out` belongs to, or None where it belongs to none."""
    file = out / "config.yaml"
    return yaml.safe_load(file.read_text()) if file.is_file() else None


def stored_result(out: Path) -> dict[str, Any] | None:
    """Return the result of the finished stage in `out`, or None where it is not finished."""
    file = out / "result.json"
    return json.loads(file.read_text()) if file.is_file() else None


def claim(out: Path, config: Mapping[str, Any], *, compare: bool) -> None:
    """Make `out` belong to `config`: a new folder, the same run again, or (`fresh`) an emptied one.

    Args:
        compare: refuse a folder whose config differs where it matters.

    Raises:
        ConfigError: another config owns the folder, or `fresh` was asked for a folder that no run made.
        DataError: the folder cannot be written to, or not emptied.
    """
    old = stored_config(out)
    if config["fresh"] and out.exists():
        with written_to(out):
            made = [path for path in out.iterdir() if path.name not in OF_A_JOB]
            if old is None and made:
                raise ConfigError(
                    f"fresh=true: {out} holds files but no config.yaml, so no run made it; remove it yourself"
                )
            for path in made:
                remove(path)
        old = None
    if old is not None and compare:
        changed = differences(old, config)
        if changed:
            shown = "; ".join(changed[:4]) + (f"; and {len(changed) - 4} more" if len(changed) > 4 else "")
            raise ConfigError(
                f"{out} was begun with another config ({shown}); give the same values, run=NAME for a run beside it"
                f" (init={out} begins it from the weights that this one has come to), or fresh=true to start over"
            )
    with written_to(out):
        out.mkdir(parents=True, exist_ok=True)
        document = yaml.safe_dump({**config, "fresh": False}, sort_keys=False, allow_unicode=True, width=120)
        with replacing(out / "config.yaml") as path:
            path.write_text(document, encoding="utf-8")


@contextmanager
def written_to(out: Path) -> Iterator[None]:
    """Say in one line that a run's folder cannot be written to, where that shows itself inside the block.

    Raises:
        DataError: it does.
    """
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out}: cannot be written ({error.strerror}); give run=NAME or out=FOLDER elsewhere"
        ) from error


def check_writable(out: Path, *, probe: bool = True) -> None:
    """Look whether a folder, or what it would be made in, can be written to; nothing of that stays.

    Args:
        probe: write a file there, which finds more than asking does. Not where another process may be emptying the
            folder: it would find that file.

    Raises:
        DataError: it cannot.
    """
    with written_to(out):
        place = next(place for place in (out, *out.parents) if place.exists())
        if probe:
            with tempfile.NamedTemporaryFile(dir=place):  # closed, then removed: NFS keeps the name of an open file
                pass
        elif not (place.is_dir() and os.access(place, os.W_OK | os.X_OK)):
            read_only = os.statvfs(place).f_flag & os.ST_RDONLY
            code = errno.EROFS if read_only else errno.EACCES if place.is_dir() else errno.ENOTDIR
            raise OSError(code, os.strerror(code), str(place))


def release(out: Path) -> None:
    """Give up a claimed folder in which nothing has been made, so that the mended command may have it.

    It is as if the refused command had not been given; where anything was made, the folder stays with its config.
    """
    made = [path for path in out.iterdir() if path.name not in OF_A_JOB]
    files = [file for path in made for file in (path, *path.rglob("*")) if not file.is_dir()]
    if all(file.name in OF_A_CLAIM for file in files):
        for path in made:
            remove(path)
        if not any(out.iterdir()):
            out.rmdir()


def remove(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; what is gone by then is as it should be."""
    with suppress(FileNotFoundError):
        if path.is_dir() and not path.is_symlink():
            for inside in path.iterdir():
                remove(inside)
            path.rmdir()
        else:
            path.unlink()


def fail(out: Path, reason: str) -> None:
    """Keep in the folder why a stage ended early, for those who look there later."""
    with suppress(OSError), (out / "log.txt").open("a", encoding="utf-8") as file:
        file.write(f"error: {again.told(reason)}\n")


def finish(out: Path, result: Mapping[str, Any]) -> None:
    """Write `result.json`, the mark of a finished stage."""
    document = json.dumps(dict(result), indent=1, ensure_ascii=False) + "\n"
    with replacing(out / "result.json") as path:
        path.write_text(document, encoding="utf-8")


def fingerprint(place: str | Path) -> str:
    """Return a short hash of what an upstream folder holds, from the file that its maker writes last.

    Of a plain folder of videos, which has no maker, names, sizes and times of the videos count.
    """
    for name in ("result.json", "dataset.json"):
        file = Path(place) / name
        if file.is_file():
            return hashlib.blake2b(file.read_bytes(), digest_size=8).hexdigest()
    videos = sorted(file for file in Path(place).rglob("*") if kind_of(file, listed=False) == "video")
    if not videos:
        return "unknown"
    stated = [(str(file.relative_to(place)), file.stat().st_size, file.stat().st_mtime_ns) for file in videos]
    return hashlib.blake2b(repr(stated).encode("utf-8", "replace"), digest_size=8).hexdigest()


def stored_upstream(out: Path) -> dict[str, dict[str, str]]:
    """Return what `out` was made from, by key of `inputs`: the path, and its fingerprint at that time."""
    file = out / "upstream.yaml"
    return (yaml.safe_load(file.read_text()) if file.is_file() else None) or {}


def called(key: str) -> str:
    """Return the config key of something that a folder was made from."""
    return key if key == "init" else f"inputs.{key}"


def bind_upstream(out: Path, inputs: Sequence[tuple[str, str]]) -> None:
    """Write down what `out` is made from; a folder that has begun goes on from the very same only.

    Raises:
        ConfigError: names the input that was made anew since `out` began.
    """
    count, now = Counter(key for key, _ in inputs), dict[str, dict[str, str]]()
    for key, place in inputs:
        name = key if count[key] == 1 else f"{key}[{sum(other.startswith(f'{key}[') for other in now)}]"
        now[name] = {"path": str(place), "fingerprint": fingerprint(place)}
    for key, before in stored_upstream(out).items():
        if key in now and now[key] != before:
            raise ConfigError(
                f"{called(key)}={now[key]['path']}: was made anew since {out} began from it; use fresh=true or run=NAME"
            )
    with replacing(out / "upstream.yaml") as path:
        path.write_text(yaml.safe_dump(now), encoding="utf-8")
