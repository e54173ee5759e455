"""Memory: nothing that libraries in C hold on to grows with the number of clips."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
from data_tiny import mp4, pixels, write_clips
from loading import video

from data_prep.media import decoded, opened, video_stream
from soratrain.data.decode import decode

LIBC = ctypes.CDLL(None)
CLIPS = 300
FLAT = 60  # bytes a clip; what is forgotten once a clip takes more than twice as many, and noise a few


class Heap(ctypes.Structure):
    """glibc's `struct mallinfo2`."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "used", "free", "top")
    ]


def growth(work: Callable[[int], object]) -> float:
    """Return by how many bytes a call what is allocated grows, once everything has been used."""
    if not hasattr(LIBC, "mallinfo2"):
        pytest.skip("this C library does not tell what is allocated")
    LIBC.mallinfo2.restype = Heap
    used = []
    for start in (0, CLIPS):
        for number in range(start, start + CLIPS):
            work(number)
        gc.collect()
        used.append(LIBC.mallinfo2().used)
    return (used[1] - used[0]) / CLIPS


def test_decoding_a_part_of_a_clip_leaves_nothing_behind() -> None:
    data = mp4(pixels(0, 32, 32, 9), Fraction(8))
    assert growth(lambda number: decode(data, fps=Fraction(8), count=1 + number % 9)) < FLAT


def test_a_file_that_is_not_decoded_to_its_end_leaves_nothing_behind(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(mp4(pixels(0, 32, 32, 9), Fraction(8)))

    def begin(_: int) -> None:
        with opened(path) as container:
            next(decoded(container, video_stream(container), lambda _: None))

    assert growth(begin) < FLAT


def test_loading_clips_over_and_over_leaves_nothing_behind(tmp_path: Path) -> None:
    items = video(str(write_clips(tmp_path, [(32, 32, 9), (32, 48, 9), (32, 32, 1)] * 2)), batch_size=1).items()
    assert growth(items.__getitem__) < FLAT
