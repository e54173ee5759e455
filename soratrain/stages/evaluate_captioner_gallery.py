"""The clips of captions.html: which are shown, and each as an element that holds it and plays.

Of each set of clips half of those shown are drawn by lot and half are the worst of the rest. A clip's lot is a hash of
its name, since clips come shape by shape.
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

from soratrain.batch import draw_of
from soratrain.media import write_video
from soratrain.stages.evaluate_captioner_clips import Clips, Item
from soratrain.stages.evaluate_captioner_scores import Told, faults

SIDE, SMALL = 320, 128  # pixels: longer sides are scaled down to the one, sides under the other show their pixels
FRAMES = 150  # of a clip that are shown


@dataclass(eq=False)
class Entry:
    """A clip on the page; `frames` are uint8 `[T, H, W, 3]` as shown, `size` is (frames, height, width) as it is."""

    told: Told
    frames: np.ndarray
    fps: float
    size: tuple[int, ...]
    faults: float


class Gallery:
    """Chooses the clips of the page while they pass, and keeps no others.

    Args:
        shown: clips of each set.
        short_bytes: as for `true_captions`.
    """

    def __init__(self, shown: int, short_bytes: int) -> None:
        self.shown, self.short_bytes = shown, short_bytes
        self.entries: dict[str, list[Entry]] = {}

    def offer(self, clips: Clips, told: Sequence[Told], items: Sequence[Item]) -> None:
        """Take clips of a set, or not."""
        kept = self.entries.setdefault(clips.name, [])
        for one, item in zip(told, items, strict=True):
            entry = Entry(one, item.frames, item.fps, item.frames.shape[:3], faults(one, self.short_bytes))
            kept.append(entry)
            drawn, others = self._parted(kept)
            kept[:] = [*drawn, *others][: self.shown]
            if entry in kept:
                entry.frames = reduced(item.frames)

    def of(self, name: str) -> list[tuple[Entry, bool]]:
        """Return the clips of a set, each with whether it is drawn by lot: those first, then the worst others."""
        drawn, others = self._parted(self.entries.get(name, []))
        return [*((entry, True) for entry in drawn), *((entry, False) for entry in others)]

    def _parted(self, entries: Sequence[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Return those that are drawn by lot, and the others, the worst first."""
        by_lot = sorted(entries, key=lambda entry: draw_of("shown", entry.told.name))
        half = math.ceil(self.shown / 2)
        return by_lot[:half], sorted(by_lot[half:], key=lambda entry: -entry.faults)


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
