"""Tiny videos of any condition, written by PyAV, for the tests of data_prep."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from data_prep.encode import Encoding
from data_prep.files import FileUnit
from data_prep.pack import Report
from data_prep.records import Sample, Source
from data_prep.shots import Cutting

PREP = {"config_hash": "0" * 16, "versions": {}}


def picture(height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """Return a smooth picture without any symmetry, uint8 `[H, W, 3]`."""
    y, x = np.mgrid[0:height, 0:width]
    waves = [
        128 + 100 * np.sin((1 + seed % 3) * x / width * 3 + y / height * 2 + phase + seed) for phase in (0, 1.5, 4)
    ]
    pixels = np.stack(waves, -1)
    pixels[: height // 3, : width // 4] = (230, 40, 40)
    return pixels.clip(0, 255).astype(np.uint8)


def moving(count: int, height: int = 48, width: int = 64, seed: int = 0) -> list[np.ndarray]:
    """Return frames of which each is a little brighter than the one before, so that it can be told which is which."""
    base = picture(height, width, seed).astype(np.int16) // 2
    return [(base + 4 * index % 128).clip(0, 255).astype(np.uint8) for index in range(count)]


def write(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    rate: Fraction | int = 10,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    options: dict[str, str] | None = None,
    ticks: Sequence[int] | None = None,
    time_base: Fraction | None = None,
    aspect: Fraction | None = None,
    audio: bool = False,
    container: dict[str, str] | None = None,
    **context: int,
) -> Path:
    """Write RGB frames as a video; frame i is shown at `ticks[i]`·`time_base`, by default at i/rate."""
    time_base = time_base or Fraction(1) / rate
    if codec == "libx264":
        options = {"crf": "10", "g": "250", "bf": "0"} | (options or {})
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=rate, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pix_fmt
        stream.codec_context.time_base = time_base
        stream.codec_context.thread_count = 1
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        sound = file.add_stream("aac", rate=16000) if audio else None
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if pix_fmt != "rgb24":
                frame = frame.reformat(
                    format=pix_fmt,
                    dst_colorspace=context.get("colorspace", 5),
                    dst_color_range=context.get("color_range", 1),
                )
            frame.pts = index if ticks is None else ticks[index]
            frame.time_base = time_base
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        if sound is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
            silence.rate, silence.pts = 16000, 0
            file.mux(sound.encode(silence))
            file.mux(sound.encode(None))
    return path


def write_sound(path: Path) -> Path:
    """Write a file with nothing but a second of silence."""
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=16000)
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 16000, 0
        file.mux(sound.encode(silence))
        file.mux(sound.encode(None))
    return path


def set_turn(path: Path, turn: tuple[int, int, int, int]) -> None:
    """Write a display matrix (a, b, c, d) into the track header of an MP4 (ISO/IEC 14496-12, 8.3.2)."""
    data = bytearray(path.read_bytes())
    at = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in turn)
    struct.pack_into(">9i", data, at, a, b, 0, c, d, 0, 0, 0, 0x40000000)
    path.write_bytes(data)


def prepared(path: Path, *, encoding: Encoding | None = None, **cutting: float) -> tuple[list[Sample], Report]:
    """Return the samples of one file, and the report of what happened to it."""
    kind = "image" if path.suffix in (".png", ".jpg", ".webp") else "video"
    unit = FileUnit(
        (Source(path.name, path, kind),),
        Cutting(**cutting),
        encoding or Encoding(),
        "",
        PREP,  # type: ignore[arg-type]
    )
    report = Report()
    return list(unit.samples(report)), report


def frames_of(data: bytes | Path) -> list[np.ndarray]:
    """Return the RGB frames of a video or image, by its own tags."""
    import io

    with av.open(io.BytesIO(data) if isinstance(data, bytes) else str(data)) as file:
        return [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]


def turned_by_definition(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """Return `[H, W, 3]` with every pixel carried to x' = a·x + c·y, y' = b·x + d·y, one by one."""
    a, b, c, d = turn
    height, width = pixels.shape[:2]
    places = {(x, y): (a * x + c * y, b * x + d * y) for y in range(height) for x in range(width)}
    left, top = min(place[0] for place in places.values()), min(place[1] for place in places.values())
    result = np.zeros((width, height, 3) if a == 0 else pixels.shape, pixels.dtype)
    for (x, y), (new_x, new_y) in places.items():
        result[new_y - top, new_x - left] = pixels[y, x]
    return result


def close(first: np.ndarray, second: np.ndarray, mean: float = 3.0) -> bool:
    """Return whether two pictures of one size differ by less than `mean` of 255 on average."""
    return first.shape == second.shape and bool(np.abs(first.astype(int) - second.astype(int)).mean() < mean)
