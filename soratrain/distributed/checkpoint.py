"""Checkpoints on disk: a folder `step-00000100` that appears whole or not at all.

    rank-00000.safetensors …   flat fragments, named <kind>/<name>: weight, average, or a state of the optimizer
    state.json                 written last: step, the other states, shapes, and for each file its size, its CRC32 and
                               where each fragment starts in its parameter

Nothing is pickled. Since every fragment says what it is a slice of, any number of ranks under any strategy can read
what any other wrote.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from soratrain.data.atomic import sync
from soratrain.errors import DataError

log = logging.getLogger(__name__)

FORMAT = 1
CHUNK = 1 << 22  # bytes read at once for a checksum


def gather(value: Any) -> list[Any]:
    """Return `value` of every rank, in order."""
    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


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


def save_checkpoint(
    folder: Path, tensors: Mapping[str, Tensor], starts: Mapping[str, int], state: Mapping[str, Any]
) -> None:
    """Write a checkpoint; every rank calls it with its own tensors, and the same folder and state.

    Args:
        tensors: flat fragments of this rank by `<kind>/<name>`; may be empty.
        starts: where each begins in its parameter.
        state: what else belongs to it: plain values.

    Raises:
        DataError: a rank could not write; what was there before stays.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    part = folder.with_name(f".{folder.name}.part")
    report: dict[str, Any] = {}
    try:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        report = {"error": f"rank {rank}: {error}"}
    ready = not any(gather(report))
    try:
        if tensors and ready:
            path = part / f"rank-{rank:05d}.safetensors"
            save_file({key: value.detach().cpu().contiguous() for key, value in tensors.items()}, str(path))
            sync(path)
            report = {"file": path.name, "bytes": path.stat().st_size, "crc32": crc32(path), "starts": dict(starts)}
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors has its own for a full disk
        report = {"error": f"rank {rank}: {error}"}
    reports = gather(report)
    if rank == 0 and not any("error" in item for item in reports):
        try:
            files = {item.pop("file"): item for item in reports if item}
            text = json.dumps({"format": FORMAT, **state, "files": files})
            (part / "state.json").write_text(text)
            sync(part / "state.json")
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(part, folder)
            sync(folder.parent)
        except OSError as error:
            reports.append({"error": str(error)})
    problems = [item["error"] for found in gather(reports) for item in found if "error" in item]
    if problems:
        if rank == 0:
            shutil.rmtree(part, ignore_errors=True)
        raise DataError(f"checkpoint {folder} was not written ({problems[0]}); free space or choose another `run`")


def read_state(folder: Path) -> dict[str, Any]:
    """Return the plain values of a checkpoint.

    Raises:
        DataError: it is damaged or incomplete; the message says how.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"checkpoint {folder} has no readable state.json ({error})") from error
    if state.get("format") != FORMAT:
        raise DataError(f"checkpoint {folder} has format {state.get('format')}; this version reads {FORMAT}")
    for name, facts in state["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts["bytes"]:
            raise DataError(f"checkpoint {folder}: {name} is missing or cut short")
    return state


def check(folder: Path) -> None:
    """Read a whole checkpoint and compare its checksums.

    Raises:
        DataError: it is damaged.
    """
    for name, facts in read_state(folder)["files"].items():
        if crc32(folder / name) != facts["crc32"]:
            raise DataError(f"checkpoint {folder}: {name} does not have the checksum it was written with")


def saved_checkpoints(root: str | Path) -> list[Path]:
    """Return the checkpoints under `root`, oldest first, damaged ones included."""
    return sorted(path for path in Path(root).glob("step-*") if path.is_dir())


def latest_checkpoint(root: str | Path) -> Path | None:
    """Return the newest whole checkpoint under `root`, or None; damaged ones are skipped with a warning."""
    for folder in reversed(saved_checkpoints(root)):
        try:
            check(folder)
        except DataError as error:
            log.warning("%s; going on from the one before", error)
        else:
            return folder
    return None


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
                self.open[file] = safe_open(str(self.folder / file), framework="pt")
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
