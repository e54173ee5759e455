"""Write finished clips: MP4 that plays anywhere, PNG for single images. A file is whole or not there."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from soratrain.data.atomic import replacing


def write_video(path: Path, frames: Iterable[np.ndarray], fps: float, crf: int = 12) -> None:
    """Write frames as H.264 (4:2:0, BT.709), odd sizes padded by the nearest row and column.

    Args:
        frames: uint8 `[T, H, W, 3]`, or `[H, W, 3]` one after another, so that a long clip need not be held.
        fps: frames per second; kept exactly up to a denominator of 1001.
        crf: x264's constant rate factor; 12 is visually lossless.
    """
    options = {"movflags": "+faststart"}
    with replacing(path) as temporary, av.open(str(temporary), "w", format="mp4", options=options) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt, stream.options = "yuv420p", {"crf": str(crf), "mbtree": "0"}
        stream.codec_context.thread_count = 1  # the same frames give the same bytes, see data_prep/encode.py
        for number, frame in enumerate(frames):
            height, width, _ = frame.shape
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            if not number:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write uint8 `[H, W, 3]` as PNG."""
    with replacing(path) as temporary:
        Image.fromarray(frame).save(temporary, format="PNG")
