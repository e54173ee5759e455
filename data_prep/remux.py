"""An H.264 stream that is right in a container that is not: its packets go unchanged into an MP4 of their own.

Nothing is taken on trust. Key frames are those that H.264 itself calls so (IDR: nothing after one refers to anything
before it), and all parameter sets must be in the header, so that decoding may begin at any key frame. The result is
then decoded, and must give the source's frames bit for bit, in order and at the constant rate. Whatever does not hold
makes the clip one to encode.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise, zip_longest
from typing import Any

import av

from data_prep.media import decoded, opened, video_stream
from data_prep.records import Probe, Source

IDR, SPS, PPS = 5, 7, 8  # types of NAL units (ITU-T H.264, table 7-1)


@dataclass(frozen=True)
class Remuxed:
    """A stream in an MP4 of its own, and the most frames from one key frame to the next."""

    media: bytes
    gop: int


@dataclass(frozen=True)
class Packet:
    """The bytes of one picture, which is number `shown` in the order of the screen; `key` where it is an IDR."""

    data: bytes
    shown: int
    key: bool


def remuxed(source: Source, probe: Probe, most: int) -> Remuxed | None:
    """Return a whole video of the right form as an MP4; None where it has to be encoded.

    Args:
        most: how many frames there may be from one key frame to the next.
    """
    frames = len(probe.times)
    try:
        with opened(source.path) as container:
            stream = video_stream(container)
            packets = packets_of(container, stream)
            keys = [place for place, packet in enumerate(packets) if packet.key]
            if len(packets) != frames or keys[:1] != [0]:
                return None  # an edit list hides some, or nothing can be decoded from the first on
            gop = max(b - a for a, b in pairwise([*keys, frames]))
            if gop > most or any(packets[place].shown != place for place in keys):
                return None
            media = muxed(stream, packets, probe.rate)
        if same(source, media, probe):
            return Remuxed(media, gop)
    except av.FFmpegError:  # the muxer, or the decoder of what it made, refuses the stream
        return None
    return None


def closed(source: Source) -> bool:
    """Return whether decoding may begin at every packet that the container calls a key frame."""
    with opened(source.path) as container:
        stream = video_stream(container)
        _, prefix = parameter_sets(bytes(stream.codec_context.extradata or b""))
        keys = [bytes(packet) for packet in container.demux(stream) if packet.size and packet.is_keyframe]
    return all(any(unit[0] & 31 == IDR for unit in units_of(data, prefix)) for data in keys)


def packets_of(container: Any, stream: Any) -> list[Packet]:
    """Return a stream's packets as they lie in the file; none where a parameter set is not in its header."""
    header = bytes(stream.codec_context.extradata or b"")
    known, prefix = parameter_sets(header)
    found: list[tuple[bytes, int | None, bool]] = []
    for packet in container.demux(stream):
        if not packet.size:
            continue
        data = bytes(packet)
        units = list(units_of(data, prefix))
        if not {unit for unit in units if unit[0] & 31 in (SPS, PPS)} <= known:
            return []
        found.append((data, packet.pts, any(unit[0] & 31 == IDR for unit in units)))
    stamps = [pts for _, pts, _ in found if pts is not None]
    if len(set(stamps)) < len(found):  # AVI has none; whether they lie in order is seen when the result is decoded
        stamps = list(range(len(found)))
    place = {pts: number for number, pts in enumerate(sorted(stamps))}
    return [Packet(data, place[pts], key) for (data, _, key), pts in zip(found, stamps, strict=True)]


def parameter_sets(header: bytes) -> tuple[set[bytes], int]:
    """Return the parameter sets in a stream's header, and how many bytes give the length of a unit in its packets.

    The header is as MP4 has it (avcC, ISO/IEC 14496-15, 5.3.3.1), or else start codes go before units, and it is 0.
    """
    if header[:1] != b"\1":
        return set(units_of(header, 0)), 0
    found: set[bytes] = set()
    at = 5
    for mask in (31, 255):  # of the bits that count the sets
        count = header[at] & mask if at < len(header) else 0
        at += 1
        for _ in range(count):
            length = int.from_bytes(header[at : at + 2])
            found.add(header[at + 2 : at + 2 + length])
            at += 2 + length
    return found, (header[4] & 3) + 1


def units_of(data: bytes, prefix: int) -> Iterator[bytes]:
    """Yield the NAL units of a packet, each after its length in `prefix` bytes, or after a start code where it is 0."""
    if prefix == 0:
        yield from (unit for part in data.split(b"\0\0\1")[1:] if (unit := part.rstrip(b"\0")))  # none ends in nought
        return
    at = 0
    while at + prefix < len(data):
        length = int.from_bytes(data[at : at + prefix])
        if length:
            yield data[at + prefix : at + prefix + length]
        at += prefix + length


def muxed(stream: Any, packets: Sequence[Packet], rate: Fraction) -> bytes:
    """Return packets of `stream` as an MP4 in which picture i is shown at i/rate; the same bytes each time."""
    buffer = io.BytesIO()
    delay = max(place - packet.shown for place, packet in enumerate(packets))
    with av.open(buffer, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        track = container.add_stream_from_template(stream)
        track.time_base = 1 / rate
        for place, packet in enumerate(packets):
            item = av.Packet(packet.data)
            item.stream, item.time_base, item.duration = track, 1 / rate, 1
            item.pts, item.dts = packet.shown, place - delay
            item.is_keyframe = packet.key
            container.mux(item)
    return buffer.getvalue()


def same(source: Source, media: bytes, probe: Probe) -> bool:
    """Return whether an MP4 shows the frames of its source, each at its place by the clock that the loader reads."""
    with opened(source.path) as container, av.open(io.BytesIO(media), "r") as result:
        track = result.streams.video[0]
        track.codec_context.thread_count = 1
        truth = (mark(frame) for frame in decoded(container, video_stream(container), lambda _: None))
        for place, (expected, frame) in enumerate(zip_longest(truth, result.decode(track))):
            if expected is None or frame is None or mark(frame) != expected:
                return False
            if frame.pts is None or frame.time_base is None:
                return False
            if round((frame.pts - (track.start_time or 0)) * frame.time_base * probe.rate) != place:
                return False
    return True


def mark(frame: av.VideoFrame) -> tuple[Any, ...]:
    """Return what tells a frame from every other one: its pixels, and what says how they are meant."""
    pixels = hashlib.blake2b(frame.to_ndarray().tobytes(), digest_size=16).digest()
    return frame.width, frame.height, frame.format.name, int(frame.colorspace), int(frame.color_range), pixels
