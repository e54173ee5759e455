"""Frames of a clip for a model that looks at pictures: taken by time of the part that is encoded, made smaller."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from soratrain.data.assignment import Bucket
from soratrain.data.decode import Window, decode_some, scaled_size, to_rgb
from soratrain.errors import ConfigError, DataError


def chosen(count: int, fps: float, per_second: float, most: int) -> list[int]:
    """Return which of `count` frames at `fps` are shown: `per_second`, but at least one and `most` at most.

    They are spread evenly in time from the first to the last; one alone is the middle one.
    """
    wanted = 1 if count == 1 else min(count, most, 1 + int((count - 1) / fps * per_second + 1e-6))  # images: any rate
    if wanted == 1:
        return [(count - 1) // 2]
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


@dataclass(frozen=True)
class Frames:
    """How frames are taken: the `Load` of an engine that shows pictures.

    Args:
        per_second: frames shown of each second.
        most: frames shown of a clip.
        side: longest side of a picture in pixels; larger ones are made smaller, none larger.

    Raises:
        ConfigError: a value out of range.
    """

    per_second: float
    most: int
    side: int

    def __post_init__(self) -> None:
        if self.per_second <= 0:
            raise ConfigError(f"engine.frames_per_second={self.per_second} must be above 0")
        for name, value, least in (("max_frames", self.most, 1), ("max_side", self.side, 16)):
            if value < least:
                raise ConfigError(f"engine.{name}={value} must be at least {least}")

    def __call__(self, data: bytes, *, fps: Fraction, frames: int, bucket: Bucket, stride: int) -> np.ndarray:
        """Return frames of the part of a clip that is encoded, uint8 `[T, H, W, 3]`.

        The part is that of `load_clip`, in time and in what of the picture is cropped, at the clip's own resolution.
        Raises DataError where they cannot be decoded.
        """
        window = Window.of(frames, bucket, stride, None)
        if not fps and window.count > 1:
            raise DataError("has a frame rate of 0, so nobody knows how long it lasts")
        shown = chosen(window.count, float(fps / stride), self.per_second, self.most)
        wanted = [window.start + number * stride for number in shown]
        return self.fitted(cropped(to_rgb(decode_some(data, wanted, fps=fps)), bucket))

    def fitted(self, frames: np.ndarray) -> np.ndarray:
        """Return `[T, H, W, 3]` with no side longer than `side`, by averaging areas."""
        height, width = frames.shape[1:3]
        scale = self.side / max(height, width)
        if scale >= 1:
            return np.ascontiguousarray(frames)
        import cv2

        size = max(1, round(width * scale)), max(1, round(height * scale))
        return np.stack([cv2.resize(frame, size, interpolation=cv2.INTER_AREA) for frame in frames])


def cropped(frames: np.ndarray, bucket: Bucket) -> np.ndarray:
    """Return the part of `[T, H, W, 3]` that the bucket's crop would keep once it is scaled.

    Raises DataError for frames that are smaller than the bucket.
    """
    height, width = frames.shape[1:3]
    high, wide = scaled_size(height, width, bucket)
    rows, columns = round(bucket.height * height / high), round(bucket.width * width / wide)
    top, left = (height - rows) // 2, (width - columns) // 2
    return frames[:, top : top + rows, left : left + columns]


def jpeg_url(frame: np.ndarray, quality: int) -> str:
    """Return a frame, uint8 `[H, W, 3]`, as a `data:image/jpeg;base64` URL."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(frame).save(held, "JPEG", quality=quality)
    return "data:image/jpeg;base64," + base64.b64encode(held.getvalue()).decode("ascii")


def told(prompt: str, frames: int, seconds: float) -> str:
    """Return what is asked, after a sentence on what is shown."""
    if frames == 1:
        return f"This is a picture{'' if not seconds else f' from the middle of a video of {seconds:.3g} s'}. {prompt}"
    return f"These are {frames} frames of one video, in order, evenly spread over {seconds:.3g} s. {prompt}"


def checked(prompts: dict[str, str], wanted: Sequence[str] | None) -> list[str]:
    """Return the styles to write, each of which has a prompt; where none is named, all that there are.

    Raises:
        ConfigError: one has none, or there are none.
    """
    styles = list(prompts) if wanted is None else list(wanted)
    if not styles:
        raise ConfigError("stage.job.prompts: is empty, so nothing is asked; write one for a style, or leave it out")
    for style in styles:
        if not prompts.get(style, "").strip():
            raise ConfigError(
                f"stage.job.styles: there is no prompt for {style!r}; give one, +stage.job.prompts.{style}='…', or use"
                f" some of {list(prompts)}"
            )
    return styles
