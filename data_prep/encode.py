"""Pixels to the bytes of a media member: H.264 in MP4, or PNG.

The same frames must give the same bytes on every run. So x264 gets one thread, since its bytes change with the thread
count, and no macroblock tree, whose vector code reads memory that nobody wrote: with it, about one tiny clip in thirty
came out differently from run to run. It gets no B-frames either, so that packets lie in the order in which they are
shown. Colour is BT.709 in limited range, tagged as such.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, VideoReformatter

BT709 = 1  # H.273 code of matrix, transfer and primaries alike
LIMITED = 1  # FFmpeg's AVCOL_RANGE_MPEG


@dataclass(frozen=True)
class Encoding:
    """How clips are encoded: x264's constant rate factor and preset, and the most frames between key frames."""

    crf: int = 18
    preset: str = "veryfast"
    gop: int = 16


class Encoder:
    """Encode frames of one clip, given one by one, into an MP4 in memory.

    Frame i is shown at i/rate. Frames are yuv420p of the given even size, BT.709, limited range.
    """

    def __init__(self, *, width: int, height: int, rate: Fraction, encoding: Encoding) -> None:
        assert width % 2 == 0 and height % 2 == 0, (width, height)
        self.frames = 0
        self._keys: list[int] = []
        self._written = 0
        self._buffer = io.BytesIO()
        self._container = av.open(self._buffer, "w", format="mp4", options={"fflags": "+bitexact"})
        options = {"preset": encoding.preset, "crf": str(encoding.crf), "g": str(encoding.gop), "bf": "0"}
        options["mbtree"] = "0"
        self._stream = self._container.add_stream("libx264", rate=rate, options=options)
        context = self._stream.codec_context
        context.width, context.height, context.pix_fmt = width, height, "yuv420p"
        context.thread_count = 1
        context.time_base = self._time_base = 1 / rate
        context.color_range, context.colorspace = LIMITED, BT709
        context.color_primaries, context.color_trc = BT709, BT709

    def add(self, frame: av.VideoFrame) -> None:
        """Append one frame; its own timestamp is overwritten."""
        frame.pts, frame.time_base = self.frames, self._time_base
        frame.pict_type = 0  # the encoder chooses key frames, not the source
        self._write(self._stream.encode(frame))
        self.frames += 1

    def finish(self) -> bytes:
        """Return the MP4; nothing can be added after it."""
        self._write(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()

    @property
    def gop(self) -> int:
        """The most frames from one key frame to the next; known after `finish`."""
        return max(b - a for a, b in zip(self._keys, [*self._keys[1:], self.frames], strict=True))

    def _write(self, packets: list[av.Packet]) -> None:
        for packet in packets:
            if packet.is_keyframe:
                self._keys.append(self._written)
            self._written += 1
            self._container.mux(packet)


def encode_rgb(frames: Iterable[np.ndarray], rate: Fraction, encoding: Encoding) -> tuple[bytes, int]:
    """Return uint8 RGB frames `[T, H, W, 3]` of even size as an MP4, and its most frames between key frames."""
    encoder: Encoder | None = None
    reformatter = VideoReformatter()
    for pixels in frames:
        if encoder is None:
            height, width = pixels.shape[:2]
            encoder = Encoder(width=width, height=height, rate=rate, encoding=encoding)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        encoder.add(
            reformatter.reformat(
                frame,
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
                dst_color_trc=ColorTrc.UNSPECIFIED,
                dst_color_primaries=ColorPrimaries.UNSPECIFIED,
                threads=1,
            )
        )
    assert encoder is not None, "a clip has at least one frame"
    return encoder.finish(), encoder.gop


def encode_png(pixels: np.ndarray) -> bytes:
    """Return a uint8 RGB image `[H, W, 3]` as a PNG."""
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt = pixels.shape[1], pixels.shape[0], "rgb24"
    context.time_base = Fraction(1)
    context.thread_count = 1
    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
    frame.pts = 0
    packets = [*context.encode(frame), *context.encode(None)]
    return b"".join(bytes(packet) for packet in packets)
