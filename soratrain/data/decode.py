"""From the bytes of a media member to frames of a bucket's size.

Frames are chosen by their timestamps, so that playback speed never changes; images are one-frame clips.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from soratrain.batch import draw_of
from soratrain.data.assignment import Bucket
from soratrain.data.fitting import GRID
from soratrain.errors import DataError

SEEK_FROM = 32  # frames; below, decoding from the start is as fast as seeking
# FFmpeg's names of the containers in which seeking leads to a key frame; in MPEG-TS, say, it leads anywhere
SEEKABLE = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")


def pick(draw: int | None, stream: str, count: int) -> int:
    """Return a number below `count` that depends on `draw` and the name `stream` alone; without a draw the middle."""
    return (count - 1) // 2 if draw is None else draw_of(draw, stream) % count


def decode(data: bytes, *, fps: Fraction, start: int = 0, count: int = 1, stride: int = 1) -> list[av.VideoFrame]:
    """Return `count` frames, every `stride`-th from number `start`; see `decode_some`."""
    return decode_some(data, range(start, start + count * stride, stride), fps=fps)


def decode_some(data: bytes, wanted: Sequence[int], *, fps: Fraction) -> list[av.VideoFrame]:
    """Return the frames with the numbers `wanted`, which ascend; no other is kept.

    Frame i is the one on the screen at i / fps seconds after the first: where the stream has a gap, the last before it.
    Raises DataError where the bytes cannot be decoded that far.
    """
    try:
        found = found_in(data, wanted, fps, seek=True) if wanted[0] >= SEEK_FROM else None
        found = found_in(data, wanted, fps, seek=False) if found is None else found
    except (av.FFmpegError, ValueError, ArithmeticError) as error:
        raise DataError(f"cannot be decoded: {error}") from error
    if found is None or len(found) < len(wanted):
        raise DataError(f"ends after {len(found or [])} of {len(wanted)} frames from {wanted[0]}")
    return found


def found_in(data: bytes, wanted: Sequence[int], fps: Fraction, *, seek: bool) -> list[av.VideoFrame] | None:
    """Return the frames with the numbers `wanted`, as far as there are any; None where seeking leads past the first."""
    found: list[av.VideoFrame] = []
    with av.open(io.BytesIO(data), mode="r") as container:
        if not container.streams.video:
            raise DataError("there is no video stream")
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        origin = stream.start_time
        if seek:
            if container.format.name not in SEEKABLE or origin is None or not stream.time_base:
                return None
            container.seek(origin + int(wanted[0] / fps / stream.time_base), stream=stream)
        shown: av.VideoFrame | None = None
        for frame in frames_of(container, stream):
            if frame.pts is not None and frame.time_base is not None:
                origin = frame.pts if origin is None else origin
                number = number_of(frame.pts - origin, frame.time_base, fps)
            else:
                number = len(found)  # a still image has no clock
            if seek and shown is None and number > wanted[0]:
                return None
            while len(found) < len(wanted) and wanted[len(found)] < number and shown is not None:
                found.append(shown)
            if len(found) < len(wanted) and wanted[len(found)] == number:
                found.append(frame)
            if len(found) == len(wanted):
                return found
            shown = frame
    return found


def number_of(ticks: int, tick: Fraction, fps: Fraction) -> int:
    """Return the number of a frame that is shown `ticks` of `tick` seconds after the first."""
    return round(ticks * tick * fps)


def frames_of(container: Any, stream: Any) -> Iterator[av.VideoFrame]:
    """Yield the frames of a stream; whoever stops before the last one loses no memory.

    PyAV frees what it holds for reading packets at the stream's end or when told to, not when it is just left alone.
    """
    with closing(container.demux(stream)) as packets:
        for packet in packets:
            yield from packet.decode()


def to_rgb(frames: list[av.VideoFrame]) -> np.ndarray:
    """Return frames as uint8 RGB `[T, H, W, 3]`, by the matrix and range that they are tagged with."""
    # one reformatter for all, or each frame would set up its own conversion, at six times the cost of decoding it
    reformatter = VideoReformatter()
    return np.stack([reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray() for frame in frames])


def scaled_size(height: int, width: int, bucket: Bucket) -> tuple[int, int]:
    """Return the size to which frames are scaled, as little as covers the bucket; what is left over is cropped.

    Where less than a cell of the grid is left over, nothing is scaled. Raises DataError for frames that are too small.
    """
    if height < bucket.height or width < bucket.width:
        raise DataError(f"frames of {width}x{height} are smaller than their bucket {bucket}")
    if height - bucket.height < GRID and width - bucket.width < GRID:
        return height, width
    scale = max(Fraction(bucket.height, height), Fraction(bucket.width, width))
    return max(round(height * scale), bucket.height), max(round(width * scale), bucket.width)


def scale(frames: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Return `[T, H, W, 3]` scaled down by averaging areas, as far as the bucket asks (see `scaled_size`)."""
    height, width = scaled_size(frames.shape[1], frames.shape[2], bucket)
    if frames.shape[1:3] == (height, width):
        return frames
    import cv2

    return np.stack([cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA) for frame in frames])


def crop(frames: np.ndarray, bucket: Bucket, draw: int | None) -> np.ndarray:
    """Return `[T, H, W, 3]` cropped to the bucket's height and width, where `draw` says."""
    top = pick(draw, "top", frames.shape[1] - bucket.height + 1)
    left = pick(draw, "left", frames.shape[2] - bucket.width + 1)
    return frames[:, top : top + bucket.height, left : left + bucket.width]


@dataclass(frozen=True)
class Window:
    """Which frames of a clip are taken: `count` frames, every `stride`-th from `start`."""

    start: int
    count: int
    stride: int

    @classmethod
    def of(cls, frames: int, bucket: Bucket, stride: int, draw: int | None) -> Window:
        """Choose a window of the bucket's duration in a clip of `frames`. Raises DataError for a shorter clip."""
        span = (bucket.frames - 1) * stride + 1
        if span > frames:
            raise DataError(f"a clip of {frames} frames is shorter than its bucket {bucket} at every {stride}. frame")
        return cls(pick(draw, "start", frames - span + 1), bucket.frames, stride)

    def of_frames(self, frames: np.ndarray) -> np.ndarray:
        """Return the window's part of all frames of a clip."""
        return frames[self.start : self.start + (self.count - 1) * self.stride + 1 : self.stride]


def load_clip(
    data: bytes,
    *,
    fps: Fraction,
    frames: int,
    bucket: Bucket,
    stride: int = 1,
    draw: int | None = None,
    within: tuple[slice, slice, slice] | None = None,
) -> np.ndarray:
    """Return a clip's window as uint8 `[T, H, W, 3]` of the bucket's size.

    Args:
        data: the media member.
        fps: of the source.
        frames: of the source.
        bucket: height, width and frames to give.
        stride: every how many source frames one is taken.
        draw: decides window and crop; None takes the middle of both, for caches and evaluation.
        within: frames, rows and columns of that window that are wanted; all by default. No other frame is kept.

    Raises:
        DataError: the bytes cannot be decoded, or are not what the manifest says.
    """
    window = Window.of(frames, bucket, stride, draw)
    times, rows, columns = within or (slice(0, window.count), slice(None), slice(None))
    start, count = window.start + times.start * stride, times.stop - times.start
    pixels = to_rgb(decode(data, fps=fps, start=start, count=count, stride=stride))
    return np.ascontiguousarray(crop(scale(pixels, bucket), bucket, draw)[:, rows, columns])


def load_whole(data: bytes, *, fps: Fraction, frames: int, bucket: Bucket) -> np.ndarray:
    """Return all of a clip's frames, scaled for the bucket but not cropped, uint8 `[T, H', W', 3]`; errors as above."""
    pixels = to_rgb(decode(data, fps=fps, count=frames))
    return scale(pixels, bucket)


class ByteBudget:
    """A store that keeps what comes first, up to a number of bytes.

    It does not evict: data that are read in a random order and do not fit would evict each other for nothing.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.used = limit, 0
        self._kept: dict[Any, Any] = {}

    def get(self, key: Any) -> Any:
        """Return what is kept under `key`, or None."""
        return self._kept.get(key)

    def room(self, size: int) -> bool:
        """Return whether `size` bytes more would fit."""
        return self.used + size <= self.limit

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep `value` of `size` bytes where there is room."""
        if self.room(size) and key not in self._kept:
            self._kept[key] = value
            self.used += size
