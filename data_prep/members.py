"""A file inside a tar, opened by its offset: it stands where a path does, so that nothing is unpacked."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal


class Window(io.RawIOBase):
    """Bytes [offset, offset + length) of a file as a file of their own; closing it closes that file."""

    def __init__(self, file: io.RawIOBase, offset: int, length: int, name: str) -> None:
        self.name = name  # FFmpeg tells some formats by the ending
        self._file, self._offset, self._length, self._place = file, offset, length, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the place in the window."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to a place in the window, or behind its end, and return it."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError(f"negative place {base + offset}")
        self._place = base + offset
        return self._place

    def readinto(self, buffer: Any) -> int:
        """Read from the window only, and return how many bytes."""
        view = memoryview(buffer)[: max(self._length - self._place, 0)]
        self._file.seek(self._offset + self._place)
        count = self._file.readinto(view) or 0
        self._place += count
        return count

    def close(self) -> None:
        """Close the file below."""
        self._file.close()
        super().close()


@dataclass(frozen=True)
class Member:
    """Bytes [offset, offset + length) of the tar `tar`, which are a file of the name `name`."""

    tar: Path
    name: str
    offset: int
    length: int

    @property
    def suffix(self) -> str:
        """The ending of the name, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def stem(self) -> str:
        """The name without folders and ending."""
        return PurePosixPath(self.name).stem

    def open(self, mode: Literal["rb"] = "rb") -> BinaryIO:
        """Open it as a file."""
        return io.BufferedReader(Window(open(self.tar, mode, buffering=0), self.offset, self.length, self.name))

    def read_bytes(self) -> bytes:
        """Return all of it."""
        with self.open() as file:
            return file.read()


File = Path | Member
