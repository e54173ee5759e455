"""Writing safetensors files piece by piece, so that no more than one tensor need be held at once.

The format (huggingface/safetensors): eight bytes with the header's length, a JSON header that says where each tensor
lies, the tensors. Since shapes and types alone decide the header, it can be written before any tensor is there. The
bytes are those that `safetensors.torch.save_file` would write.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

CHUNK = 1 << 22  # bytes written at once
WINDOW = 1 << 26  # bytes that the system may hold in its memory for a file that is being written
ALIGN = 8
DTYPES = {  # of the format, in the order in which it sorts tensors
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
RANKS = {dtype: place for place, dtype in enumerate(DTYPES)}


@dataclass(frozen=True)
class Form:
    """Type and shape of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Return those of `tensor`."""
        return cls(tensor.dtype, tuple(tensor.shape))

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def in_order(forms: Mapping[str, Form]) -> list[str]:
    """Return names in the order in which a file holds them: wide types first, then by name."""
    return sorted(forms, key=lambda name: (RANKS[forms[name].dtype], name))


@dataclass(frozen=True)
class Layout:
    """What a file will hold.

    Attributes:
        header: its first bytes, up to where tensors begin.
        starts: where each tensor begins after the header, in the order of the file.
        nbytes: of all tensors.
    """

    header: bytes
    starts: dict[str, int]
    nbytes: int

    @classmethod
    def of(cls, forms: Mapping[str, Form]) -> Layout:
        """Return how tensors of these forms lie in a file."""
        starts, entries, end = dict[str, int](), {}, 0
        for name in in_order(forms):
            form = forms[name]
            starts[name], end = end, end + form.nbytes
            entries[name] = {
                "dtype": DTYPES[form.dtype],
                "shape": list(form.shape),
                "data_offsets": [starts[name], end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % ALIGN)
        return cls(len(text).to_bytes(8, "little") + text, starts, end)


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor, of a copy where it is not on the CPU or not contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def write(
    path: Path, header: bytes, pieces: Iterable[memoryview], stop: Callable[[], bool] = lambda: False
) -> tuple[int, int]:
    """Write a file and have the disk keep it; return its bytes and its CRC32.

    What is written is not kept in the system's page cache, where it would take the place of what is read (shards), and
    whose filling costs more of a core than all else does.

    Args:
        pieces: what follows the header.
        stop: asked as it goes on, whether to give up.

    Raises:
        OSError: the disk is full or takes nothing, or it was given up.
    """
    size = crc = kept = 0
    with path.open("wb") as file:
        for part in _chunks(header, pieces):
            if stop():
                raise InterruptedError("given up")
            file.write(part)
            size, crc = size + len(part), zlib.crc32(part, crc)
            if size - kept >= WINDOW:
                _let_go(file, kept)
                kept = size
        _let_go(file, kept)
    return size, crc


def _let_go(file: BinaryIO, start: int) -> None:
    """Have the disk keep what is written, and the page cache let go of it from `start` on."""
    file.flush()
    os.fsync(file.fileno())
    with suppress(AttributeError, OSError):  # advice: macOS has none, and some file systems take none
        os.posix_fadvise(file.fileno(), start, 0, os.POSIX_FADV_DONTNEED)


def _chunks(header: bytes, pieces: Iterable[memoryview]) -> Iterator[memoryview]:
    yield memoryview(header)
    for piece in pieces:
        for start in range(0, len(piece), CHUNK):
            yield piece[start : start + CHUNK]


def shards(forms: Mapping[str, Form], largest: int) -> list[list[str]]:
    """Return which tensors go into which file, none over `largest` bytes but where a single tensor is."""
    found: list[list[str]] = [[]]
    size = 0
    for name in in_order(forms):
        if found[-1] and size + forms[name].nbytes > largest:
            found.append([])
            size = 0
        found[-1].append(name)
        size += forms[name].nbytes
    return found
