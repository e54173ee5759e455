"""Checkpoints on disk: a folder `step-00000100` that appears whole or not at all; `saving.py` writes them.

    rank-00000.safetensors …   flat fragments, named <kind>/<name>: weight, average, or a state of the optimizer
    state.json                 written last: step, ranks, the other states, shapes, and for each file its size, its
                               CRC32 and where each fragment starts in its parameter; and a CRC32 of all this

Nothing is pickled. Since every fragment says what it is a slice of, any number of ranks under any strategy can read
what any other wrote.
"""

from __future__ import annotations

import json
import logging
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soratrain.amounts import counted
from soratrain.errors import ConfigError, DataError, on_all_ranks

log = logging.getLogger(__name__)

FORMAT = 2
CHUNK = 1 << 22  # bytes read at once for a checksum
GONE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # what is not there, rather than out of reach


class UnreadableError(DataError):
    """A checkpoint that cannot be read now, and may be whole: it is not passed over, and not removed."""


def gather(value: Any, group: Any = None) -> list[Any]:
    """Return `value` of every rank, in order."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group)
    return values


def own_place() -> tuple[int, int]:
    """Return this process's rank, and how many there are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def crc32(path: Path) -> int:
    """Return the CRC32 of a file."""
    value = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            value = zlib.crc32(chunk, value)
    return value


def folder_of(root: Path, step: int) -> Path:
    """Return where the checkpoint of `step` lies under `root`."""
    return root / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(folder.name.removeprefix("step-"))


def part_of(folder: Path) -> Path:
    """Return where a checkpoint lies until it is whole."""
    return folder.with_name(f".{folder.name}.part")


def remove_parts(root: Path) -> list[str]:
    """Remove what writes that were cut short have left under `root`; return the names of those checkpoints."""
    found = sorted(root.glob(".step-*.part"))
    for folder in found:
        shutil.rmtree(folder)
    return [folder.name.removeprefix(".").removesuffix(".part") for folder in found]


def with_checksum(state: Mapping[str, Any]) -> str:
    """Return the text of `state.json`."""
    return json.dumps({**state, "crc32": zlib.crc32(json.dumps(state).encode())})


def read_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint.

    Raises:
        UnreadableError: it cannot be read now, or not by this version.
        DataError: it is damaged or incomplete; the message says how.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}")
    except (*GONE, ValueError) as error:
        raise DataError(f"checkpoint {folder} has no readable state.json ({error})") from error
    except OSError as error:
        raise unreadable(folder, "state.json", error) from error
    stored = state.pop("crc32", None)
    intact = stored == zlib.crc32(json.dumps(state).encode())
    if state.get("format") != FORMAT:
        kind = UnreadableError if intact else DataError
        raise kind(f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}")
    if not intact:
        raise DataError(f"checkpoint {folder}: state.json does not have the checksum it was written with")
    for name, facts in state["files"].items():
        try:
            size = (folder / name).stat().st_size
        except GONE:
            size = None
        except OSError as error:
            raise unreadable(folder, name, error) from error
        if size != facts["bytes"]:
            raise DataError(f"checkpoint {folder}: {name} is missing or cut short")
    return state


def unreadable(folder: Path, name: str, error: OSError) -> UnreadableError:
    """Return the error that says that a file of a checkpoint is out of reach."""
    return UnreadableError(f"checkpoint {folder}: {name} cannot be read now ({error.strerror or error})")


def check(folder: Path, share: int = 0, shares: int = 1) -> None:
    """Read a checkpoint and compare its checksums.

    Args:
        share, shares: only every so many-th file, from this one on, where others check the rest.

    Raises:
        UnreadableError: it cannot be read now.
        DataError: it is damaged.
    """
    for name, facts in list(sorted(read_state(folder)["files"].items()))[share::shares]:
        try:
            found = crc32(folder / name)
        except GONE as error:
            raise DataError(f"checkpoint {folder}: {name} is missing") from error
        except OSError as error:
            raise unreadable(folder, name, error) from error
        if found != facts["crc32"]:
            raise DataError(f"checkpoint {folder}: {name} does not have the checksum it was written with")


def saved_checkpoints(root: str | Path) -> list[Path]:
    """Return the checkpoints under `root`, oldest first, damaged ones included."""
    return sorted(path for path in Path(root).glob("step-*") if path.is_dir() and path.name[5:].isdigit())


def problem_of(folder: Path) -> DataError | None:
    """Return what is wrong with a checkpoint, None where it is whole.

    Where ranks have found each other, all call it: they share the reading, and agree.
    """
    found: DataError | None = None
    try:
        check(folder, *own_place())
    except DataError as error:
        found = error
    said = [one for one in gather(found and (isinstance(found, UnreadableError), str(found))) if one]
    if not said:
        return None
    out_of_reach, words = min(said)  # what one rank finds damaged, another's rights do not mend
    return UnreadableError(words) if out_of_reach else DataError(words)


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return the newest whole checkpoint under `root`, or None; damaged ones are skipped with a warning.

    Where ranks have found each other, all call it, and agree.

    Raises:
        UnreadableError: on every rank, where a newer one cannot be read now: it may be whole.
    """
    for folder in reversed(gather(saved_checkpoints(root))[0]):
        problem = problem_of(folder)
        if problem is None:
            return folder
        if isinstance(problem, UnreadableError):
            raise on_all_ranks(
                UnreadableError(
                    f"{problem}: see to that and give the same command again, or move the folder away to go on from"
                    " the one before"
                )
            )
        if own_place()[0] == 0:
            log.warning("%s; it is left out", problem)
    return None


def check_ranks(folder: Path, before: int, now: int, *, elastic: bool) -> None:
    """Say that a run goes on with another number of ranks.

    Raises:
        ConfigError: it may not.
    """
    if before == now:
        return
    if not elastic:
        raise on_all_ranks(
            ConfigError(
                f"trainer.elastic=false: {folder} was written by {counted(before, 'ranks')} and this run has {now};"
                " start as many, or set trainer.elastic=true: the same samples in the same order, equal but for"
                " rounding"
            )
        )
    if own_place()[0] == 0:
        log.info("going on with %s, after %d: the same samples in the same order", counted(now, "ranks"), before)


class CheckpointReader:
    """Reads any slice of any parameter from a checkpoint, whichever ranks wrote it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.state = folder, read_state(folder)
        self.pieces: dict[str, list[tuple[str, int]]] = {}
        for file, facts in self.state["files"].items():
            for key, start in facts["starts"].items():
                self.pieces.setdefault(key, []).append((file, start))
        self.open: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        return key in self.pieces

    def read(self, key: str, start: int, numel: int) -> Tensor:
        """Return numbers `start` to `start + numel` of `<kind>/<name>`, flat.

        Raises:
            DataError: some of them are not in the checkpoint.
        """
        found, values = 0, None
        for file, begin in self.pieces.get(key, []):
            if file not in self.open:
                try:
                    self.open[file] = safe_open(str(self.folder / file), framework="pt")
                except (OSError, SafetensorError) as error:
                    raise DataError(f"checkpoint {self.folder}: {file} cannot be read ({error})") from error
            piece = self.open[file].get_slice(key)
            first, last = max(start, begin), min(start + numel, begin + piece.get_shape()[0])
            if first < last:
                part = piece[first - begin : last - begin]
                if last - first == numel:
                    return part
                values = torch.zeros(numel, dtype=part.dtype) if values is None else values
                values[first - start : last - start] = part
                found += last - first
        if values is None or found != numel:
            raise DataError(f"checkpoint {self.folder} lacks {key}, numbers {start} to {start + numel}")
        return values
