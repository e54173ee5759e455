"""The output folder: whose it is, what state it is in, and how a finished build replaces an unfinished one.

While a build runs, all it writes lies in `.building/`: `state.json` (the settings, and what the input was), one tar
and one JSON a unit of work, and the finished shards. Publishing moves them out and writes `dataset.json` last, so a
folder with a `dataset.json` and no `.building/` is whole. Every step can be repeated after a crash.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.pack import Packed
from data_prep.records import SCHEMA, dumps
from data_prep.schema import hash_of
from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError, DataError

BUILDING = ".building"
PARTS = ("manifest", "captions/gt", "failures.jsonl", "stats.json")


@dataclass(frozen=True)
class Identity:
    """What a build is: its settings, and a hash of what its input held when it began.

    `files` is a hash of the same without the captions; empty where nothing can be told from that.
    """

    settings: dict[str, Any]
    listing: str
    files: str = ""

    @property
    def hash(self) -> str:
        """Hash of the settings."""
        return hash_of(self.settings)


def claim(
    folder: Path, identity: Identity, *, fresh: bool, indexed: bool = False
) -> Literal["new", "continue", "done"]:
    """Make `folder` ready for a build and say what is there of it already; with `indexed` it holds another's tars.

    Raises:
        ConfigError: it was made with other settings, or from input that has changed, and `fresh` is not set.
        DataError: it holds files of somebody else, or cannot be written.
    """
    building = folder / BUILDING
    state, dataset = _read(building / "state.json"), _read(folder / "dataset.json")
    if folder.exists() and not folder.is_dir():
        raise DataError(f"output={folder} is a file; name a folder")
    foreign = not building.is_dir() and not _ours(dataset) and folder.exists() and any(folder.iterdir())
    if (foreign or _indexed(state) or _indexed(dataset)) and not indexed:
        raise DataError(f"output={folder} holds files that data_prep did not make; name an empty or a new folder")
    if state is not None and _same(state, identity):
        return "continue"
    if not fresh:
        if _ours(dataset):
            assert dataset is not None
            _compare(folder, dataset, identity, "was made")
            if not building.is_dir():
                return "done"
        elif state is not None:
            _compare(folder, state, identity, "holds an unfinished build")
    try:
        if building.is_dir():
            with held(folder):
                shutil.rmtree(building)
        (building / "units").mkdir(parents=True)
        write_json(building / "state.json", asdict(identity) | {"stored": _stored(dataset, identity)})
    except OSError as error:
        raise DataError(f"output={folder} cannot be written: {error.strerror}; name another folder") from error
    return "new"


def made(folder: Path) -> str | None:
    """Return by which task data_prep has finished a folder; None where it has not."""
    dataset = _read(folder / "dataset.json")
    if dataset is None or not _ours(dataset) or (folder / BUILDING).is_dir():
        return None
    return str(dataset.get("settings", {}).get("task", "build"))


def stored(folder: Path) -> dict[str, int] | None:
    """Return the shards, with their numbers of samples, that an unfinished build takes its media from; None of none."""
    found: dict[str, int] | None = (_read(folder / BUILDING / "state.json") or {}).get("stored")
    return found


def fingerprint(dataset: dict[str, Any]) -> str:
    """Return a hash that identifies a finished folder by its shards, its settings and the models it is scored by."""
    rated = {"rated": dataset["rated"]} if dataset.get("rated") else {}  # a folder without is what it was before
    return hash_of({key: dataset.get(key) for key in ("settings", "listing", "shards", "totals")} | rated)


def described(identity: Identity, packed: Packed, rated: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return what dataset.json says of finished shards; `rated` is from which trained models they have scores."""
    return {
        "config_hash": identity.hash,
        "settings": identity.settings,
        "listing": identity.listing,
        "files": identity.files,
        "shards": [asdict(shard) for shard in packed.shards],
        "totals": packed.totals,
        "histograms": packed.histograms,
    } | ({"rated": rated} if rated else {})


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other runs out of an unfinished build.

    Raises:
        DataError: one is at work already, or the build is another user's.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(open(folder / BUILDING / "lock", "w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, FileNotFoundError) as error:
            raise DataError(f"output={folder}: another data_prep is at work there; wait for it") from error
        except PermissionError as error:
            raise DataError(f"output={folder}: {error}; name a folder that you may write to") from error
        yield


def publish(folder: Path, dataset: dict[str, Any], *, keep_shards: bool = False) -> None:
    """Move a finished build from `.building/shards` to `folder`, over what was there; dataset.json comes last.

    With `keep_shards` the tars in `folder` stay as they are: only what describes them is new.
    """
    building = folder / BUILDING
    replaced = building / "replaced.json"
    if (folder / "dataset.json").exists():  # from here on the folder does not look whole
        os.replace(folder / "dataset.json", replaced)
    for entry in [] if keep_shards else (_read(replaced) or {}).get("shards", []):
        (folder / Path(entry["name"]).name).unlink(missing_ok=True)
    for name in PARTS:
        if (building / "shards" / name).exists():
            _remove(folder / name)
    for path in sorted((building / "shards").rglob("*")):
        if path.is_file():
            target = folder / path.relative_to(building / "shards")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, target)
    write_json(folder / "dataset.json", {"schema": SCHEMA, "made_by": "data_prep"} | dataset)
    shutil.rmtree(building)


def discard(folder: Path) -> None:
    """Remove an unfinished build, and the folder where nothing else is in it."""
    shutil.rmtree(folder / BUILDING, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` to `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def write_lines(path: Path, values: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text("".join(dumps(value) + "\n" for value in values), encoding="utf-8")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return what `write_lines` wrote; names of files may hold what Unicode calls the end of a line."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def _ours(dataset: dict[str, Any] | None) -> bool:
    return dataset is not None and dataset.get("made_by") == "data_prep"


def _indexed(found: dict[str, Any] | None) -> bool:
    return found is not None and found.get("settings", {}).get("task") == "index"


def _stored(dataset: dict[str, Any] | None, identity: Identity) -> dict[str, int] | None:
    """Return the shards of a finished folder from which only the captions differ."""
    if dataset is None or not _ours(dataset) or dataset.get("settings") != identity.settings:
        return None
    if not _captions_only(dataset, identity):
        return None
    return {shard["name"]: shard["samples"] for shard in dataset["shards"]}


def _captions_only(found: dict[str, Any], identity: Identity) -> bool:
    return found.get("listing") != identity.listing and bool(identity.files) and found.get("files") == identity.files


def _same(state: dict[str, Any], identity: Identity) -> bool:
    return state.get("settings") == identity.settings and state.get("listing") == identity.listing


def _compare(folder: Path, found: dict[str, Any], identity: Identity, what: str) -> None:
    before, now = _flat(found.get("settings", {})), _flat(identity.settings)
    changed = [
        f"{key}={before.get(key, 'none')} (now {now.get(key, 'none')})"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise ConfigError(
            f"output={folder} {what} with {', '.join(changed)}; give another output, or fresh=true to replace it"
        )
    if _captions_only(found, identity):
        raise ConfigError(
            f"output={folder} {what} with other captions of the same files; fresh=true takes these, and of a finished "
            "folder nothing is decoded again"
        )
    if found.get("listing") != identity.listing:
        finished = identity.settings.get("task") in ("select", "repack")
        how = "it was made again, or scored" if finished else "files added, removed or of another size"
        raise ConfigError(
            f"output={folder} {what} from an input that has changed since ({how}); fresh=true builds it again"
        )


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
