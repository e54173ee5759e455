"""What a video file really holds, found by decoding every frame; headers are only believed where frames agree."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from statistics import median
from typing import Any

import av

from data_prep import pulse
from data_prep.alpha import AlphaWatch, has_alpha
from data_prep.media import Unusable, cut_off, decoded, hides_alpha, opened, turn_of, video_stream
from data_prep.members import File
from data_prep.records import Cut, Picture, Probe, Source

STANDARD = [Fraction(n, d) for n, d in ((24000, 1001), (30000, 1001), (60000, 1001), (25, 2), (15, 2))] + [
    Fraction(rate) for rate in (1, 2, 4, 5, 6, 8, 10, 12, 15, 16, 20, 24, 25, 30, 48, 50, 60, 100, 120)
]
JITTER = 0.1  # of a frame: timestamps this near to a constant rate are that rate, badly rounded
COARSE = 0.34  # of a frame: how far rounding to the container's clock may move a timestamp
FASTEST, SLOWEST = 240, Fraction(1, 60)  # frames/s
DENOMINATOR = 1001
PART = 1 << 22  # bytes read at once for a hash


def probe(source: Source, watch: Callable[[av.VideoFrame], None], cuts: Callable[[], tuple[Cut, ...]]) -> Probe:
    """Decode all of a video; `watch` sees each frame as it is shown, and `cuts` is asked afterwards where shots begin.

    Raises:
        Unusable: it cannot be opened, has no video, or no frame of it can be decoded.
    """
    damages: list[str] = []
    stamps: list[tuple[int | None, int | None, int]] = []
    picture: Picture | None = None
    keys: list[int] = []
    interlaced = lost = False
    alpha = AlphaWatch()
    with opened(source.path) as container:
        stream = video_stream(container)
        tick = float(stream.time_base)
        for frame in decoded(container, stream, damages.append):
            if picture is None:
                picture = picture_of(frame, stream)
                lost = hides_alpha(stream) and not has_alpha(frame)
            interlaced = interlaced or frame.interlaced_frame
            if frame.key_frame:
                keys.append(len(stamps))
            stamps.append((frame.pts, frame.dts, frame.duration or 0))
            watch(alpha.seen(frame))
        if picture is None:
            raise Unusable("no frame could be decoded" + (f": {damages[0].format(0)}" if damages else ""))
        if not damages and (cut_off(source.path) or len(stamps) < stream.frames and container.format.name == "avi"):
            if container.format.name == "gif" and len(stamps) > 1:
                stamps.pop()  # its decoder gives what there is of it
            damages.append(f"the file is cut off: frames after {len(stamps)} are missing")
        stated = [rate for rate in (stream.average_rate, stream.guessed_rate, stream.base_rate) if rate]
        times, end = shown_at(stamps, tick, stated)
        rate, constant = fit_rate(times, tick, stated)
        starts = (
            [*keys, len(stamps)] if keys[:1] == [0] else [0, len(stamps)]
        )  # else an edit list cut the key frame off
        return Probe(
            id=hash_file(source.path),
            container=container.format.name,
            codec=stream.codec_context.name,
            stream=stream.index,
            streams=len(container.streams),
            picture=replace(picture, interlaced=interlaced, alpha="lost" if lost else alpha.result),
            times=tuple(times),
            end=len(times) / float(rate) if constant else end,
            rate=rate,
            constant=constant,
            gop=max(b - a for a, b in pairwise(starts)),
            headed=keys[:1] == [0],
            damage=damages[0] if damages else "",
            cuts=tuple(cut for cut in cuts() if cut.frame < len(times)),
        )


def picture_of(frame: av.VideoFrame, stream: Any) -> Picture:
    """Return how the pixels of a stream become a picture, from its first frame."""
    aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio or Fraction(1)
    return Picture(
        width=frame.width,
        height=frame.height,
        pix_fmt=frame.format.name,
        turn=turn_of(frame),
        aspect=aspect if aspect > 0 else Fraction(1),
        full_range=int(frame.color_range) == 2 or frame.format.name.startswith(("yuvj", "gray")),
        matrix=int(frame.colorspace),
        transfer=int(frame.color_trc),
    )


def shown_at(
    stamps: Sequence[tuple[int | None, int | None, int]], tick: float, stated: Sequence[Fraction]
) -> tuple[list[float], float]:
    """Return when each frame is shown, in seconds from the first, and when the last one ends.

    Presentation timestamps count; where a container has them wrong (AVI with packed B-frames), decoding timestamps do;
    where neither increases, frames follow the stated rate.
    """
    step = float(1 / stated[0]) if stated else 1 / 25
    times = [index * step for index in range(len(stamps))]
    for column in (0, 1):
        values = [stamp[column] for stamp in stamps]
        known = [value for value in values if value is not None]
        if len(known) == len(values) and all(b > a for a, b in pairwise(known)):
            times = [(value - known[0]) * tick for value in known]
            break
    if len(times) > 1:
        step = median(b - a for a, b in pairwise(times))
    last = stamps[-1][2] * tick
    return times, times[-1] + (last if 0 < last < 10 * step else step)


def fit_rate(times: Sequence[float], tick: float, stated: Sequence[Fraction]) -> tuple[Fraction, bool]:
    """Return the constant rate that `times` follow and True, or the rate to resample them to and False.

    The first rate that fits is taken: what the file states, then the usual ones, then the measured mean.
    """
    usable = [rate.limit_denominator(DENOMINATOR) for rate in stated if SLOWEST <= rate <= FASTEST]
    if len(times) == 1:
        return (usable or [Fraction(25)])[0], True
    mean = Fraction((len(times) - 1) / (times[-1] - times[0])).limit_denominator(DENOMINATOR)
    usual = sorted(STANDARD, key=lambda rate: abs(rate - mean))
    for rate in (*usable, *usual, mean):
        if rate <= 0:
            continue
        period = float(1 / rate)
        allowed = max(min(1.01 * tick, COARSE * period), JITTER * period)
        if all(abs(time - i * period) <= allowed for i, time in enumerate(times)):
            return rate, True
    common = 1 / median(b - a for a, b in pairwise(times))
    near = min(STANDARD, key=lambda rate: abs(float(rate) - common))
    if abs(float(near) - common) > 0.03 * common:
        near = Fraction(common).limit_denominator(DENOMINATOR)
    return min(max(near, SLOWEST), Fraction(120)), False


def hash_file(path: File) -> str:
    """Return 32 hex digits that identify a file's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(PART):
            digest.update(part)
            pulse.beat()
    return digest.hexdigest()
