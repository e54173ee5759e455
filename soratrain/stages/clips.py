"""Clips to measure on, of shards or of a plain folder of videos, streamed in pieces and never stretched.

One rule for both: a clip is taken from its first frame, to at most `max_frames` and then down to 1 + k times the
VAE's stride in time, and its middle is taken, down to multiples of its stride in space. Where a `size` is asked for,
frames are first scaled down to cover it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from itertools import islice
from pathlib import Path

import numpy as np

from data_prep.convert import converted, size_of
from data_prep.files import TROUBLE
from data_prep.ingest import find
from data_prep.media import Unusable, decoded, opened, video_stream
from data_prep.pack import Report
from data_prep.probe import probe
from data_prep.records import Probe, Source, Span
from data_prep.transcode import limited, resampled
from soratrain.data.assignment import Bucket
from soratrain.data.decode import crop, decode, scale, to_rgb
from soratrain.data.members import open_shards, read_members
from soratrain.data.reading import read_manifest
from soratrain.errors import DataError
from soratrain.quality import WINDOW

log = logging.getLogger(__name__)

PIECE = 16  # frames decoded at once


@dataclass(frozen=True)
class Clip:
    """A clip to measure.

    Attributes:
        name: its key in shards, or its path below the folder.
        fps: frames a second.
        source: its own height, width and frames.
        bucket: what is taken of it.
        scaled: whether frames are scaled down to cover the bucket, not only cropped.
        frames: gives its frames from the first, uint8 RGB `[n, H, W, 3]`, in pieces.
    """

    name: str
    fps: Fraction
    source: Bucket
    bucket: Bucket
    scaled: bool
    frames: Callable[[], Iterator[np.ndarray]]

    def pieces(self) -> Iterator[np.ndarray]:
        """Yield what is taken, uint8 `[n, H, W, 3]`, in pieces.

        Raises:
            DataError: it cannot be decoded that far.
        """
        wanted = self.bucket.frames
        for piece in self.frames():
            piece = piece[:wanted]
            wanted -= len(piece)
            yield np.ascontiguousarray(crop(scale(piece, self.bucket) if self.scaled else piece, self.bucket, None))
            if not wanted:
                return
        raise DataError(f"it ends {wanted} frames early")


@dataclass(frozen=True)
class Fit:
    """What is taken of a clip.

    Args:
        stride: the VAE's, in time, height and width.
        min_frames, max_frames: of what is taken; None for no bound.
        size: height and width to cover; None takes each clip's own.
    """

    stride: tuple[int, int, int]
    min_frames: int
    max_frames: int | None
    size: tuple[int, int] | None

    def of(self, source: Bucket) -> Bucket | str:
        """Return what is taken of a clip, or why nothing is."""
        time, rows, columns = self.stride
        frames = 1 + (min(source.frames, self.max_frames or source.frames) - 1) // time * time
        if frames < self.min_frames:
            return f"fewer than {self.min_frames} frames"
        height, width = self.size or (source.height // rows * rows, source.width // columns * columns)
        if height > source.height or width > source.width:
            return f"smaller than {width}x{height}"
        if min(height, width) < WINDOW:
            return f"a side under {WINDOW} pixels, SSIM's window"
        return Bucket(height, width, frames)

    def __str__(self) -> str:
        """Return the rule in words, for the report."""
        time, rows, columns = self.stride
        longest = f"at most {self.max_frames} frames, then " if self.max_frames else ""
        sides = f"multiples of {rows}" if rows == columns else f"multiples of {rows} and {columns}"
        space = (
            f"scaled down to cover {self.size[1]}x{self.size[0]}, its middle" if self.size else f"its middle, {sides}"
        )
        return f"each clip from its first frame: {longest}1 + {time}k; {space}"


def is_videos(place: str) -> bool:
    """Return whether `place` is a plain folder with videos in it, not shards."""
    path = Path(place)
    if not path.is_dir() or (path / "dataset.json").is_file() or (path / "manifest").is_dir():
        return False
    try:
        return any(source.kind == "video" for source in find(place, Report(), "none")[0])
    except DataError:
        return False


def candidates(places: Sequence[str], fit: Fit, seed: int) -> Iterator[Clip | tuple[str, str]]:
    """Yield clips of shards, or of folders of videos, in an order that `seed` draws; or (name, why it is left out).

    Raises:
        DataError: a place holds neither.
    """
    videos = [place for place in places if is_videos(place)]
    if videos and len(videos) < len(places):
        raise DataError(f"inputs.shards: {videos[0]} is a folder of videos, others are shards; give one kind at a time")
    found = (of_videos if videos else of_shards)(places, np.random.default_rng(seed))
    for clip in found:
        if isinstance(clip, tuple):
            yield clip
            continue
        taken = fit.of(clip.source)
        yield (
            (clip.name, taken) if isinstance(taken, str) else replace(clip, bucket=taken, scaled=fit.size is not None)
        )


def of_shards(places: Sequence[str], order: np.random.Generator) -> Iterator[Clip]:
    """Yield the clips of shards, whole."""
    manifest = read_manifest(*places)
    reader = open_shards(manifest, None)
    for index in order.permutation(len(manifest)):
        row = manifest.row(int(index))
        fps = Fraction(row.fps_num, max(row.fps_den, 1))

        def frames(row=row, fps=fps) -> Iterator[np.ndarray]:
            _, media = read_members(reader, row)
            for start in range(0, row.frames, PIECE):
                yield to_rgb(decode(media, fps=fps, start=start, count=min(PIECE, row.frames - start)))

        size = Bucket(row.h, row.w, row.frames)
        yield Clip(row.key, fps, size, size, False, frames)


def of_videos(places: Sequence[str], order: np.random.Generator) -> Iterator[Clip | tuple[str, str]]:
    """Yield the videos of folders, whole, decoded as data_prep decodes them; or (name, why one is left out)."""
    sources = [source for place in places for source in find(place, Report(), "none")[0]]
    for index in order.permutation(len(sources)):
        source = sources[index]
        if source.kind != "video":
            yield source.uri, "an image"
            continue
        try:
            found = probe(source, lambda _: None, tuple)
        except (Unusable, *TROUBLE) as error:
            yield source.uri, f"cannot be used: {error}"
            continue
        if found.damage:
            log.warning("%s: %s; the %.3g s before are used", source.uri, found.damage, found.end)
        width, height = size_of(found.picture)
        height, width = (width, height) if found.picture.sideways else (height, width)
        span = Span(0, len(found.times), 0.0, found.end, whole=True)
        size = Bucket(height, width, len(resampled(found, span)))

        def frames(source=source, found=found, span=span) -> Iterator[np.ndarray]:
            shown = shown_frames(source, found, span)
            while piece := list(islice(shown, PIECE)):
                yield to_rgb(piece)

        yield Clip(source.uri, found.rate, size, size, False, frames)


def shown_frames(source: Source, found: Probe, span: Span) -> Iterator:
    """Yield the frames of a video as they would go into shards, but for the encoding.

    Raises:
        DataError: it can no longer be decoded.
    """
    shows = resampled(found, span)
    place = 0
    try:
        with opened(source.path) as container:
            stream = video_stream(container)
            whole = limited(decoded(container, stream, lambda _: None), len(found.times))
            for index, frame in enumerate(converted(whole, found.picture, stream.time_base)):
                while place < len(shows) and shows[place] == index:
                    yield frame
                    place += 1
    except (Unusable, *TROUBLE) as error:
        raise DataError(f"cannot be decoded: {error}") from error
