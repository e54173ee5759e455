"""What can be measured of a clip without a trained model, from the very bytes that go into a shard.

    black      share of frames that are black all over
    static     share of steps from one frame to the next in which nothing moves; 1 for a slide
    letterbox  share of the picture that is black bars along its edges, over the whole clip
    blur       0 for a sharp picture to 1 for one without any detail: 1 / (1 + v / 100), where v is the variance of the
               Laplacian (Pech-Pacheco et al., 2000), in the median frame
    motion     how far the picture moves, in picture diagonals a second: the mean length of H.264's motion vectors
    phash      perceptual hashes of the first, the middle and the last frame, 48 hex digits (similar.py)

A still image has no `static` and no `motion`. Pictures are looked at in grey and at most SIDE pixels wide or high.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from statistics import median
from typing import Any

import av
import cv2
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from data_prep.media import Unusable, decoded, video_stream

SIDE = 256  # pixels of the longer side
BLACK = 20  # of 255, full range: as dark as what is meant to be black gets in a compressed picture
ALL_OVER = 0.98  # share of pixels that makes a frame black, or a row part of a bar: a logo or noise may stick out
CELLS, STILL = 32, 3.0  # recompressing an unchanged picture changes no cell of so many a side by this much of 255
DETAIL = 100.0  # the variance of the Laplacian at which blur is one half
HASH = 8  # a hash is HASH × HASH signs


def score(media: bytes, *, fps: float, image: bool) -> dict[str, Any]:
    """Return the scores of a clip or image.

    Args:
        media: the member of a shard, H.264 in MP4 or an image.
        fps: frames a second.
        image: whether it is a still.

    Raises:
        Unusable: it cannot be decoded.
    """
    blacks, details, hashes = [], [], []
    steps: list[float] = []
    moved: list[float] = []
    brightest: np.ndarray | None = None
    before: np.ndarray | None = None
    for grey, vectors in looked_at(media, image=image):
        blacks.append(float((grey < BLACK).mean()) >= ALL_OVER)
        details.append(float(cv2.Laplacian(grey, cv2.CV_32F).var()))
        hashes.append(perceptual_hash(grey))
        if before is not None:
            steps.append(change(before, grey))
        if vectors is not None:
            moved.append(vectors)
        brightest = grey if brightest is None else np.maximum(brightest, grey)
        before = grey
    if brightest is None:
        raise Unusable("no frame of the finished clip could be decoded")
    scores = {
        "black": round(sum(blacks) / len(blacks), 4),
        "letterbox": round(0.0 if all(blacks) else bars(brightest), 4),
        "blur": round(1 / (1 + median(details) / DETAIL), 4),
        "phash": "".join(hashes[place] for place in (0, len(hashes) // 2, -1)),
    }
    if not image:
        scores["static"] = round(sum(step < STILL for step in steps) / len(steps), 4) if steps else 1.0
        scores["motion"] = round(fps * sum(moved) / len(moved), 4) if moved else 0.0
    return dict(sorted(scores.items()))


def looked_at(media: bytes, *, image: bool) -> Iterator[tuple[np.ndarray, float | None]]:
    """Yield each frame in grey, uint8 `[h, w]`, and how far it moved since another, in diagonals; None where intra."""
    reformatter = VideoReformatter()
    cv2.setNumThreads(1)
    with av.open(io.BytesIO(media), "r") as container:
        stream = video_stream(container)
        stream.codec_context.options = {"flags2": "+export_mvs"}
        for frame in decoded(container, stream, lambda _: None):
            scale = min(1.0, SIDE / max(frame.width, frame.height))
            size = {"width": max(round(frame.width * scale), HASH), "height": max(round(frame.height * scale), HASH)}
            small = reformatter.reformat(frame, **size, format="gray", interpolation=Interpolation.AREA, threads=1)
            yield small.to_ndarray(), None if image or frame.key_frame else length(frame)
            if image:
                return


def change(before: np.ndarray, after: np.ndarray) -> float:
    """Return how much the cell that changes most has changed, of 255; what a codec does within a cell cancels out."""
    cells = cv2.resize(after.astype(np.float32) - before, (CELLS, CELLS), interpolation=cv2.INTER_AREA)
    return float(np.abs(cells).max())


def length(frame: av.VideoFrame) -> float:
    """Return the mean length of a frame's motion vectors, weighted by their blocks' areas, in picture diagonals.

    Blocks that were coded without one count as unmoved.
    """
    side_data: Any = frame.side_data
    found = [item.to_ndarray() for item in side_data if item.type.name == "MOTION_VECTORS"]
    if not found:
        return 0.0
    vectors = found[0][found[0]["source"] < 0]  # from the past: a block predicted from both sides counts once
    areas = vectors["w"].astype(np.float64) * vectors["h"]
    lengths = np.hypot(vectors["motion_x"], vectors["motion_y"]) / np.maximum(vectors["motion_scale"], 1)
    return float((areas * lengths).sum() / (frame.width * frame.height) / np.hypot(frame.width, frame.height))


def bars(brightest: np.ndarray) -> float:
    """Return the share of a picture that lies in black bars along its edges, from each pixel's brightest moment."""
    height, width = brightest.shape
    dark = brightest < BLACK
    rows = np.flatnonzero(dark.mean(1) < ALL_OVER)
    columns = np.flatnonzero(dark.mean(0) < ALL_OVER)
    if not len(rows) or not len(columns):
        return 0.0
    inside = (rows[-1] - rows[0] + 1) * (columns[-1] - columns[0] + 1)
    return 1 - float(inside) / (height * width)


def perceptual_hash(grey: np.ndarray) -> str:
    """Return 16 hex digits: which of the lowest cosine frequencies lie above their median (Zauner, 2010, pHash)."""
    small = cv2.resize(grey, (4 * HASH, 4 * HASH), interpolation=cv2.INTER_AREA).astype(np.float32)
    low = cv2.dct(small)[1 : HASH + 1, 1 : HASH + 1]
    return np.packbits(low > np.median(low)).tobytes().hex()
