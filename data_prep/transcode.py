"""Clips of a video to the one form that shards hold: upright, square pixels, even size, constant rate, 8-bit 4:2:0.

Playback speed never changes: a frame of the result shows what the source showed at that time. Nothing is encoded again
without need: an MP4 that is already in this form, and used whole, is copied byte for byte; where only its container is
not, the stream's packets are (`remux`).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import av

from data_prep import hdr
from data_prep.convert import converted, size_of
from data_prep.encode import Encoder, Encoding
from data_prep.media import UPRIGHT, Unusable, decoded, opened, video_stream
from data_prep.records import Caption, How, Probe, Sample, Source, Span, make_sample
from data_prep.remux import closed, remuxed

LARGEST = 16384  # pixels of a side, for x264


@dataclass(frozen=True)
class Encoded:
    """A finished media member: its bytes, frames, most frames between key frames, how it came to be, and why so."""

    media: bytes
    frames: int
    gop: int
    how: How
    why: str = ""


def why_not(probe: Probe, spans: list[Span], encoding: Encoding) -> str:
    """Return why a video's packets cannot go into a shard as they are; empty where they can."""
    picture = probe.picture
    if len(spans) > 1 or not spans[0].whole:
        return "cut from a longer file"
    if probe.damage:
        return "damaged"
    if probe.codec != "h264" or picture.pix_fmt != "yuv420p" or picture.full_range or picture.transfer in hdr.NAMES:
        return "another codec or pixel format"
    if picture.turn != UPRIGHT or size_of(picture) != (picture.width, picture.height) or picture.interlaced:
        return "turned, resized or not progressive"
    if not probe.constant:
        return "varying rate"
    if probe.gop > encoding.gop:
        return f"key frames more than {encoding.gop} apart"
    return "" if probe.headed else "begins between key frames"


def is_alone(source: Source, probe: Probe) -> bool:
    """Return whether a file is an MP4 with one stream and nothing else."""
    return source.path.suffix.lower() == ".mp4" and "mp4" in probe.container and probe.streams == 1


def kept(source: Source, probe: Probe, encoding: Encoding) -> Encoded | None:
    """Return a whole video whose packets are right without encoding it; None where it has to be encoded."""
    if is_alone(source, probe) and closed(source):
        return Encoded(source.path.read_bytes(), len(probe.times), probe.gop, "copied")
    found = remuxed(source, probe, encoding.gop)
    return Encoded(found.media, len(probe.times), found.gop, "remuxed") if found else None


def resampled(probe: Probe, span: Span) -> list[int]:
    """Return which source frame each frame of a clip shows.

    Frame k shows what the source shows in the middle of [k/rate, (k+1)/rate), so jitter moves nothing, and the clip is
    as long as the span to within half a frame.
    """
    if probe.constant:
        return list(range(span.first, span.stop))
    count = max(round((span.end - span.start) * probe.rate), 1)
    chosen = []
    for k in range(count):
        time = span.start + float((k + 0.5) / probe.rate)
        chosen.append(min(max(bisect_right(probe.times, time) - 1, span.first), span.stop - 1))
    return chosen


def transcode(
    source: Source,
    probe: Probe,
    spans: list[Span],
    captions: tuple[Caption, ...],
    *,
    encoding: Encoding,
    license: str,
    prep: dict[str, Any],
) -> Iterator[Sample]:
    """Yield each span of a video as a sample, in one pass over the file.

    Raises:
        Unusable: the picture is of a kind that cannot be converted.
    """
    picture = probe.picture
    if min(size_of(picture)) < 2:
        raise Unusable(f"the picture is only {picture.width}x{picture.height} pixels")
    if max(size_of(picture)) > LARGEST:
        square = "x".join(map(str, size_of(picture)))
        shape = f" with square pixels (its own are {picture.aspect})" if picture.aspect != 1 else ""
        raise Unusable(f"the picture is {square} pixels{shape}; H.264 takes {LARGEST} a side at most")
    why = why_not(probe, spans, encoding)
    if not why:
        if whole := kept(source, probe, encoding):
            yield sample_of(source, probe, spans[0], captions, whole, license=license, prep=prep)
            return
        why = "could not be remuxed"
    queue = iter(spans)
    span = next(queue, None)
    encoder: Encoder | None = None
    with opened(source.path) as container:
        stream = video_stream(container)
        frames = limited(decoded(container, stream, lambda _: None), len(probe.times))
        for index, frame in enumerate(converted(frames, probe.picture, stream.time_base)):
            if span is None:
                return
            if index < span.first:
                continue
            if encoder is None:
                encoder = Encoder(width=frame.width, height=frame.height, rate=probe.rate, encoding=encoding)
                shows = resampled(probe, span)
            while encoder.frames < len(shows) and shows[encoder.frames] == index:
                encoder.add(frame)
            if index == span.stop - 1:
                encoded = Encoded(encoder.finish(), encoder.frames, encoder.gop, "encoded", why)
                yield sample_of(source, probe, span, captions, encoded, license=license, prep=prep)
                span, encoder = next(queue, None), None
    if span is not None:
        raise Unusable("decoding it a second time gave fewer frames; is the file being written?")


def limited(frames: Iterable[av.VideoFrame], count: int) -> Iterator[av.VideoFrame]:
    """Yield the first `count` frames."""
    for index, frame in enumerate(frames):
        if index == count:
            return
        yield frame


def sample_of(
    source: Source,
    probe: Probe,
    span: Span,
    captions: tuple[Caption, ...],
    encoded: Encoded,
    *,
    license: str,
    prep: dict[str, Any],
) -> Sample:
    """Return a clip as a sample."""
    picture = probe.picture
    width, height = size_of(picture)
    if picture.sideways:
        width, height = height, width
    video = {
        "w": width,
        "h": height,
        "fps": [probe.rate.numerator, probe.rate.denominator],
        "frames": encoded.frames,
        "codec": "h264",
        "pix_fmt": "yuv420p",
        "gop": encoded.gop,
        "orig": {
            "container": probe.container,
            "stream": probe.stream,
            "codec": probe.codec,
            "pix_fmt": picture.pix_fmt,
            "w": picture.width,
            "h": picture.height,
            "frames": len(probe.times),
            "seconds": round(probe.end, 6),
            "constant_rate": probe.constant,
            "gop": probe.gop,
            "turn": list(picture.turn),
            "aspect": [picture.aspect.numerator, picture.aspect.denominator],
            "interlaced": picture.interlaced,
            "full_range": picture.full_range,
            "alpha": picture.alpha,
            "hdr": hdr.NAMES.get(picture.transfer, ""),
            "damage": probe.damage,
        },
    }
    where = {"id": probe.id, "uri": source.uri, "start_us": round(span.start * 1e6), "end_us": round(span.end * 1e6)}
    sample = make_sample(
        source=where | {"license": license},
        kind="video",
        ext="mp4",
        media=encoded.media,
        video=video,
        captions=captions,
        prep=prep,
        how=encoded.how,
    )
    return replace(sample, why=encoded.why)
