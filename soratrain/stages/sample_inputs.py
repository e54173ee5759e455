"""The files that a way to sample starts from: pictures, videos and masks, of any kind that PyAV opens.

They are read as data_prep reads them (upright, square pixels, constant rate, what is transparent on white), and each
is known by a hash of its bytes.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import islice, repeat
from pathlib import Path

import numpy as np

from data_prep.alpha import on_white, transparent
from data_prep.convert import size_of
from data_prep.files import TROUBLE
from data_prep.media import Unusable, decoded, opened, turn_of, video_stream
from data_prep.probe import hash_file, probe
from data_prep.records import Probe, Source, Span
from data_prep.stills import turned
from data_prep.transcode import resampled
from soratrain.data.decode import to_rgb
from soratrain.errors import ConfigError, DataError
from soratrain.stages.clips import shown_frames
from soratrain.stages.sample_fit import cover, said_of, same_aspect, scaled

log = logging.getLogger(__name__)

WHITE = 128  # from this level on a mask is white
PIECE = 16  # frames converted at once


@dataclass(frozen=True, eq=False)
class Picture:
    """A still picture, uint8 `[H, W, 3]`; `key` is the config's, `digest` of the file's bytes."""

    key: str
    path: str
    digest: str
    pixels: np.ndarray


@dataclass(frozen=True, eq=False)
class Video:
    """A video that plays.

    Attributes:
        key: the config's, for messages.
        path: as it was given.
        found: what decoding it showed.
        height, width: of its frames, upright.
        frames: at its own rate.
    """

    key: str
    path: str
    found: Probe
    height: int
    width: int
    frames: int

    @property
    def digest(self) -> str:
        """A hash of the file's bytes."""
        return self.found.id

    @property
    def rate(self) -> Fraction:
        """Frames a second."""
        return self.found.rate

    def read(self, stride: int = 1, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
        """Yield frames from number `start`, every `stride`-th, uint8 `[H, W, 3]`, `count` of them.

        Raises:
            DataError: it can no longer be decoded.
        """
        found, span = self.found, Span(0, len(self.found.times), 0.0, self.found.end, whole=True)
        shown = shown_frames(Source(self.path, Path(self.path), "video"), found, span)
        stop = None if count is None else start + count * stride
        chosen = islice(shown, start, stop, stride)
        while piece := list(islice(chosen, PIECE)):
            yield from to_rgb(piece)


def given(key: str, path: str | None, what: str) -> str:
    """Return the path, if it is that of a file.

    Raises:
        ConfigError: it is not set, or there is no such file.
    """
    if not path:
        raise ConfigError(f"{key} is not set: give {what}, {key}=FILE")
    if not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "does not exist"
        raise ConfigError(f"{key}={path}: {kind}; give {what}")
    return path


@lru_cache(maxsize=64)
def open_picture(key: str, path: str) -> Picture:
    """Return the picture in a file (PNG, JPEG, WebP, …); of a video its first frame.

    Raises:
        ConfigError: there is no such file.
        DataError: it cannot be decoded.
    """
    file, damages = Path(given(key, path, "a picture")), list[str]()
    try:
        with opened(file) as container:
            frame = next(iter(decoded(container, video_stream(container), damages.append)), None)
            if frame is None:
                raise Unusable(damages[0].format(0) if damages else "no picture in it can be decoded")
            pixels = on_white(frame) if transparent(frame) else frame.to_ndarray(format="rgb24")
            return Picture(key, path, hash_file(file), turned(pixels, turn_of(frame)))
    except (Unusable, *TROUBLE) as error:
        raise DataError(f"{key}={path}: {error}; give a picture that can be opened (PNG, JPEG, WebP)") from error


@lru_cache(maxsize=64)
def open_video(key: str, path: str) -> Video:
    """Return the video in a file, decoded once to see that it plays.

    Raises:
        ConfigError: there is no such file.
        DataError: no frame of it can be decoded.
    """
    source = Source(path, Path(given(key, path, "a video")), "video")
    try:
        found = probe(source, lambda _: None, tuple)
    except (Unusable, *TROUBLE) as error:
        raise DataError(f"{key}={path}: {error}; give a video that plays") from error
    if found.damage:
        log.warning("%s=%s: %s; the %.3g s before are used", key, path, found.damage, found.end)
    width, height = size_of(found.picture)
    height, width = (width, height) if found.picture.sideways else (height, width)
    frames = len(resampled(found, Span(0, len(found.times), 0.0, found.end, whole=True)))
    if min(height, width) < 2:
        raise DataError(f"{key}={path}: its frames are only {width}x{height} pixels; give a larger video")
    return Video(key, path, found, height, width, frames)


@dataclass(frozen=True)
class Taken:
    """What is taken of a video: every `stride`-th frame, scaled to cover a size and its middle cropped."""

    video: Video
    stride: int
    height: int
    width: int

    @property
    def fps(self) -> float:
        """Frames a second."""
        return float(self.video.rate / self.stride)

    @property
    def frames(self) -> int:
        """How many frames there are."""
        return 1 + (self.video.frames - 1) // self.stride

    def raw(self, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
        """Yield `count` frames from number `start`, uint8 `[H, W, 3]` of the video's own size."""
        return self.video.read(self.stride, start * self.stride, count)

    def read(self, start: int = 0, count: int | None = None) -> Iterator[np.ndarray]:
        """Yield `count` frames from number `start`, uint8 `[H, W, 3]`."""
        return (cover(frame, self.height, self.width) for frame in self.raw(start, count))

    def masks(self, mask: Video, count: int) -> Iterator[np.ndarray]:
        """Yield what a mask hides of the first `count` frames, bool of the video's size; a still one the same in all.

        Raises:
            ConfigError: it has another aspect ratio or another number of frames than the video.
        """
        video = self.video
        if not same_aspect(video.height, video.width, mask.height, mask.width):
            raise ConfigError(
                f"{mask.key}={mask.path}: is {mask.width}x{mask.height}, the video {video.width}x{video.height}; give a"
                " mask of the same aspect ratio"
            )
        if mask.frames not in (1, video.frames):
            raise ConfigError(
                f"{mask.key}={mask.path}: has {mask.frames} frames, the video {video.frames}; give as many, or one"
            )
        frames = mask.read(self.stride, 0, count) if mask.frames > 1 else repeat(next(mask.read()), count)
        return (scaled(frame.mean(-1) >= WHITE, video.height, video.width) for frame in frames)

    def said(self, *more: str, fitted: bool = True) -> str:
        """Return a line on what is done to the video, for people; empty where nothing is.

        Args:
            more: what else is done.
            fitted: whether it is brought to the size by the usual rule.
        """
        video = self.video
        parts = [said_of(self.height, self.width, video.height, video.width)] if fitted else []
        if self.stride > 1:
            parts.append(f"every {self.stride}. of {float(video.rate):g} frames a second")
        said = "; ".join(part for part in (*parts, *more) if part)
        return f"{video.path}: {said}" if said else ""
