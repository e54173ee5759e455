"""Where clips begin and end: cuts found in the picture, long shots divided, short ones left out."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import av
from av.video.reformatter import Interpolation, VideoReformatter

from data_prep.records import Cut, Probe, Span

SIDE = 256  # pixels of the longer side that the detector looks at
EDGE = 1e-6  # seconds
STRONG = 2.0  # times min_content


@dataclass(frozen=True)
class Cutting:
    """How videos are cut: see conf/data_prep/data_prep.yaml, `shots`."""

    detect: bool = True
    threshold: float = 3.0
    min_content: float = 15.0
    min_seconds: float = 0.4
    max_seconds: float = 20.0
    margin: float = 0.0
    stride: float | None = None


class CutFinder:
    """PySceneDetect's adaptive detector on small copies of the frames, one after the other."""

    def __init__(self, cutting: Cutting) -> None:
        import cv2
        from scenedetect import FrameTimecode

        from data_prep.detector import Detector

        cv2.setNumThreads(1)
        self._timecode = FrameTimecode
        self._detector = Detector(
            adaptive_threshold=cutting.threshold, min_content_val=cutting.min_content, min_scene_len=1
        )
        self._reformatter = VideoReformatter()
        self._seen = 0
        self._cuts: list[int] = []

    def watch(self, frame: av.VideoFrame) -> None:
        """Look at the next frame."""
        scale = min(1.0, SIDE / max(frame.width, frame.height))
        size = {"width": max(round(frame.width * scale), 8), "height": max(round(frame.height * scale), 8)}
        small = self._reformatter.reformat(frame, **size, format="bgr24", interpolation=Interpolation.AREA, threads=1)
        found = self._detector.process_frame(self._timecode(self._seen, fps=25.0), small.to_ndarray())
        self._cuts += [cut.frame_num for cut in found]
        self._seen += 1

    def cuts(self) -> tuple[Cut, ...]:
        """Return where new shots begin."""
        return tuple(Cut(frame, self._detector.contents[frame]) for frame in sorted(set(self._cuts)))


def spans(probe: Probe, cutting: Cutting) -> tuple[list[Span], Counter[str]]:
    """Return the clips of a video, and how many parts were left out for which reason.

    A file that is one shot and not too long stays whole, however short. A longer shot is divided into clips of
    `max_seconds`; where the rest would be shorter than `min_seconds`, into equal ones, so that nothing is lost. With a
    `stride`, clips begin that far apart and what lies between them is passed over. `margin` is cut off beside each cut.
    """
    count = len(probe.times)
    bounds = [0, *believed(probe, cutting), count]
    kept: list[Span] = []
    dropped: Counter[str] = Counter()
    for edges in pairwise(bounds):
        first, stop = trimmed(probe, *edges, cutting.margin)
        if first >= stop:
            dropped["all of it within shots.margin of a cut"] += 1
            continue
        for begin, finish in divided(probe, first, stop, cutting):
            start, end = shown(probe, begin), shown(probe, finish)
            whole = (begin, finish) == (0, count) and not probe.damage
            if whole or end - start >= cutting.min_seconds - EDGE:
                kept.append(Span(begin, finish, start, end, whole))
            else:
                dropped["shorter than shots.min_seconds"] += 1
    return kept, dropped


def believed(probe: Probe, cutting: Cutting) -> list[int]:
    """Return the cuts to go by.

    One that would leave a part shorter than `min_seconds` must be strong: beside a repeated frame, ordinary motion
    looks like a cut to a detector that compares neighbours.
    """
    kept: list[int] = []
    for cut in probe.cuts:
        start = shown(probe, cut.frame)
        room = min(start - (shown(probe, kept[-1]) if kept else 0.0), shown(probe, len(probe.times)) - start)
        if room >= cutting.min_seconds - EDGE or cut.content >= STRONG * cutting.min_content:
            kept.append(cut.frame)
    return kept


def trimmed(probe: Probe, first: int, stop: int, margin: float) -> tuple[int, int]:
    """Return a shot without `margin` seconds beside each of its cuts, where a fade or a late cut may show the other."""
    if margin and first > 0:
        first = bisect_left(probe.times, shown(probe, first) + margin - EDGE, first, stop)
    if margin and stop < len(probe.times):
        stop = bisect_right(probe.times, shown(probe, stop) - margin + EDGE, 0, stop) - 1
    return first, stop


def divided(probe: Probe, first: int, stop: int, cutting: Cutting) -> list[tuple[int, int]]:
    """Return one shot as clips (first, stop) of at most `max_seconds`."""
    start, end = shown(probe, first), shown(probe, stop)
    length = end - start
    if length <= cutting.max_seconds + EDGE:
        return [(first, stop)]
    if cutting.stride:
        return strided(probe, first, stop, cutting.max_seconds, cutting.stride)
    step = cutting.max_seconds
    parts = -int(-(length - EDGE) // step)
    if length - (parts - 1) * step < cutting.min_seconds:
        step = length / parts
    inner = [bisect_left(probe.times, start + part * step - EDGE, first, stop) for part in range(1, parts)]
    edges = sorted({first, *inner, stop})
    return list(pairwise(edges))


def strided(probe: Probe, first: int, stop: int, seconds: float, stride: float) -> list[tuple[int, int]]:
    """Return clips of `seconds` (the last one may be shorter) that begin `stride` seconds apart."""
    start, end = shown(probe, first), shown(probe, stop)
    found = []
    for number in range(int((end - start - EDGE) // stride) + 1):
        begin = start + number * stride
        edges = [bisect_left(probe.times, time - EDGE, first, stop) for time in (begin, begin + seconds)]
        if edges[1] > edges[0]:
            found.append((edges[0], edges[1]))
    return found


def shown(probe: Probe, frame: int) -> float:
    """Return when a frame begins, in seconds; for the number of frames, when the last one ends."""
    if probe.constant:
        return float(frame / probe.rate)
    return probe.times[frame] if frame < len(probe.times) else probe.end
