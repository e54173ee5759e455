"""Images as one-frame samples: copied as they are, or turned upright and laid on white as PNG where needed."""

from __future__ import annotations

from typing import Any

import numpy as np

from data_prep.alpha import on_white, transparent
from data_prep.encode import encode_png
from data_prep.media import UPRIGHT, Unusable, decoded, opened, turn_of, video_stream
from data_prep.probe import hash_file
from data_prep.records import Sample, Source, make_sample

CODECS = {"mjpeg": "jpg", "png": "png", "webp": "webp"}


def still(source: Source, *, license: str, prep: dict[str, Any]) -> Sample:
    """Return an image as a sample.

    Raises:
        Unusable: it cannot be decoded.
    """
    damages: list[str] = []
    with opened(source.path) as container:
        stream = video_stream(container)
        frame = next(iter(decoded(container, stream, damages.append)), None)
        codec = stream.codec_context.name
    if frame is None:
        raise Unusable("the image cannot be decoded" + (f" ({damages[0]})" if damages else ""))
    turn, ext = turn_of(frame), CODECS.get(codec, "")
    clear = transparent(frame)
    copied = turn == UPRIGHT and bool(ext) and not clear
    if copied:
        media, width, height = source.path.read_bytes(), frame.width, frame.height
    else:
        pixels = turned(on_white(frame) if clear else frame.to_ndarray(format="rgb24"), turn)
        media, ext = encode_png(pixels), "png"
        height, width = pixels.shape[:2]
    video = {
        "w": width,
        "h": height,
        "fps": [1, 1],
        "frames": 1,
        "codec": codec if copied else "png",
        "pix_fmt": frame.format.name if copied else "rgb24",
        "gop": 1,
        "orig": {"codec": codec, "pix_fmt": frame.format.name, "w": frame.width, "h": frame.height, "turn": list(turn)},
    }
    where = {"id": hash_file(source.path), "uri": source.uri, "start_us": 0, "end_us": 0, "license": license}
    return make_sample(
        source=where,
        kind="image",
        ext=ext,
        media=media,
        video=video,
        captions=source.captions,
        prep=prep,
        how="copied" if copied else "encoded",
    )


def turned(pixels: np.ndarray, turn: tuple[int, int, int, int]) -> np.ndarray:
    """Return `[H, W, 3]` turned as a display matrix (a, b, c, d) says: x' = a·x + c·y, y' = b·x + d·y, y down."""
    a, b, c, d = turn
    if a == 0:
        pixels, a, d = pixels.swapaxes(0, 1), c, b
    return np.ascontiguousarray(pixels[:: 1 if d > 0 else -1, :: 1 if a > 0 else -1])
