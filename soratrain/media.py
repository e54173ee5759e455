"""Write finished clips: MP4 that plays anywhere, PNG for single images."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 12) -> None:
    """Write uint8 `[T, H, W, 3]` as H.264 (4:2:0, BT.709), odd sizes padded by the nearest row and column.

    Args:
        fps: frames per second; kept exactly up to a denominator of 1001.
        crf: x264's constant rate factor; 12 is visually lossless.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _, height, width, _ = frames.shape
    frames = np.pad(frames, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.options = {"crf": str(crf)}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_image(path: Path, frame: np.ndarray) -> None:
    """Write uint8 `[H, W, 3]` as PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(frame).save(path)
