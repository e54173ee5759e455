"""What lets through what is behind it, images and videos alike, is laid on white."""

from __future__ import annotations

from typing import Literal

import av
import numpy as np

Alpha = Literal["", "laid on white", "lost", "ignored"]  # what became of a video's transparency, if it has any
WHY: dict[Alpha, str] = {
    "lost": "its transparency is lost: of this codec it is read by libvpx alone, which FFmpeg here does not have",
    "ignored": "its transparency hides all of every frame; it is taken for a layer that nobody filled in",
}


class AlphaWatch:
    """Look at a video's frames one by one for what their transparency is good for."""

    def __init__(self) -> None:
        self._lowest, self._highest = 255, 0

    def seen(self, frame: av.VideoFrame) -> av.VideoFrame:
        """Return a frame as it will be shown, as far as can be told by now."""
        if not has_alpha(frame):
            self._highest = 255
            return frame
        alpha = frame.to_ndarray(format="rgba")[..., 3]
        lowest = int(alpha.min())
        self._lowest, self._highest = min(self._lowest, lowest), max(self._highest, int(alpha.max()))
        return frame if lowest == 255 or self._highest == 0 else laid(frame)

    @property
    def result(self) -> Alpha:
        """What is to be done with the transparency, when all frames were seen."""
        if self._lowest == 255:
            return ""
        return "laid on white" if self._highest > 0 else "ignored"  # 32-bit AVI, for one, leaves it at nought


def has_alpha(frame: av.VideoFrame) -> bool:
    """Return whether a frame's format knows transparency."""
    return frame.format.name == "pal8" or any(part.is_alpha for part in frame.format.components)


def transparent(frame: av.VideoFrame) -> bool:
    """Return whether any pixel of a frame lets through what is behind it."""
    return has_alpha(frame) and bool((frame.to_ndarray(format="rgba")[..., 3] < 255).any())


def on_white(frame: av.VideoFrame) -> np.ndarray:
    """Return a frame with transparency as uint8 RGB `[H, W, 3]` before a white ground."""
    pixels = frame.to_ndarray(format="rgba").astype(np.uint16)
    alpha = pixels[..., 3:]
    return ((pixels[..., :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def laid(frame: av.VideoFrame) -> av.VideoFrame:
    """Return `on_white` of a frame as a frame."""
    result = av.VideoFrame.from_ndarray(on_white(frame), format="rgb24")
    result.pts, result.time_base = frame.pts, frame.time_base
    return result
