"""The clips of captions.html: which are shown, and each as an element that holds it and plays.

Of each set of clips half of those shown are drawn by lot and half are the worst of the rest.
"""

from __future__ import annotations

import base64
import html
import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from soratrain.media import write_video
from soratrain.stages.evaluate_captioner_clips import Clips, Item
from soratrain.stages.evaluate_captioner_scores import Told, faults

SIDE, SMALL = 320, 128  # pixels: longer sides are scaled down to the one, sides under the other show their pixels
FRAMES = 150  # of a clip that are shown


@dataclass
class Entry:
    """A clip on the page; `frames` are uint8 `[T, H, W, 3]` as shown, `size` is (frames, height, width) as it is."""

    told: Told
    frames: np.ndarray
    fps: float
    size: tuple[int, int, int]
    drawn: bool
    faults: float


class Gallery:
    """Chooses the clips of the page while they pass, and keeps no others.

    Args:
        shown: clips of each set.
        styles, short_bytes: as for `true_captions`.
    """

    def __init__(self, shown: int, styles: Sequence[str], short_bytes: int) -> None:
        self.shown, self.styles, self.short_bytes = shown, styles, short_bytes
        self.entries: dict[str, list[Entry]] = {}

    def offer(self, clips: Clips, told: Sequence[Told], items: Sequence[Item]) -> None:
        """Take clips of a set, or not."""
        kept = self.entries.setdefault(clips.name, [])
        by_lot = math.ceil(self.shown / 2)
        for one, item in zip(told, items, strict=True):
            bad = faults(one, self.styles, self.short_bytes)
            drawn = sum(entry.drawn for entry in kept) < by_lot
            worst = sorted((entry for entry in kept if not entry.drawn), key=lambda entry: entry.faults)
            if not drawn and len(worst) >= self.shown - by_lot:
                if not worst or bad <= worst[0].faults:
                    continue
                kept.remove(worst[0])
            size = item.frames.shape
            kept.append(Entry(one, reduced(item.frames), item.fps, (size[0], size[1], size[2]), drawn, bad))

    def of(self, name: str) -> list[Entry]:
        """Return the clips of a set: those drawn by lot, then the worst of the others first."""
        kept = self.entries.get(name, [])
        worst = sorted((entry for entry in kept if not entry.drawn), key=lambda entry: -entry.faults)
        return [*(entry for entry in kept if entry.drawn), *worst]


def reduced(frames: np.ndarray) -> np.ndarray:
    """Return at most FRAMES frames, scaled down to SIDE where they are larger."""
    frames, side = frames[:FRAMES], max(frames.shape[1:3])
    if side <= SIDE:
        return frames.copy()
    size = (max(1, round(frames.shape[2] * SIDE / side)), max(1, round(frames.shape[1] * SIDE / side)))
    return np.stack([np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BOX)) for frame in frames])


def playable(entry: Entry) -> str:
    """Return a clip as an element of the page; small ones are enlarged first, so that colours keep their edges."""
    factor = max(1, SMALL * 2 // max(entry.frames.shape[1:3])) if max(entry.frames.shape[1:3]) < SMALL else 1
    frames = entry.frames.repeat(factor, axis=1).repeat(factor, axis=2)
    name = html.escape(entry.told.name, quote=True)
    if len(frames) == 1:
        return f'<img alt="{name}" src="{picture(frames[0])}">'
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, frames, entry.fps, crf=20)
        data = base64.b64encode(path.read_bytes()).decode()
    still = picture(entry.frames[0])  # until it plays
    kept = f'poster="{still}" src="data:video/mp4;base64,{data}"'
    return f'<video aria-label="{name}" muted loop playsinline {kept}></video>'


def picture(frame: np.ndarray) -> str:
    """Return a frame as an address that holds it."""
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
