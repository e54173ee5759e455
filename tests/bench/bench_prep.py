"""What `task=build` makes of files a second and core, what the time goes into, and ffmpeg's own command beside it.

Clips of 640x360 that are all encoded anew (MPEG-4, every other one turned by its display matrix), and the same as H.264
that is copied. ffmpeg does what the step `transcode` does, with the same filters and x264 settings on one thread, and
nothing else: it looks for no cuts, and scores and hashes nothing. The parts are measured in one process, which does
the same units as a worker, with a clock around each step.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import av
import numpy as np
from rich.console import Console

TITLE = "data_prep: files of 640x360, 96 frames at 24 frames/s, a second and core"
FILES, FRAMES, RATE, HEIGHT, WIDTH, ROUNDS = 24, 96, 24, 360, 640, 3
PLAIN = (
    "colorspace=ispace=smpte170m:space=bt709:irange=tv:range=tv:itrc=bt709:trc=bt709:iprimaries=bt709:primaries=bt709"
)
PLAIN += ",format=yuv420p"
X264 = ["-c:v", "libx264", "-preset", "veryfast", "-crf", "18", "-g", "16", "-bf", "0", "-x264-params", "mbtree=0"]
LIMITS = ["-threads", "1", "-filter_threads", "1", "-an", "-y", "-loglevel", "error"]


def moving(seed: int) -> Iterator[np.ndarray]:
    """Yield a blurred picture with grain that drifts: about as hard for a codec as real footage."""
    import cv2

    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (HEIGHT // 16, WIDTH // 16, 3), dtype=np.uint8)
    field = cv2.resize(small, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(np.int16)
    field = (field + random.normal(0, 6, field.shape)).clip(0, 255).astype(np.uint8)
    for frame in range(FRAMES):
        yield np.roll(field, (frame, 3 * frame), (0, 1))


def write(folder: Path, codec: str) -> None:
    """Write the files; of MPEG-4, every other one lies on its side."""
    options = {"g": "16", "bf": "0", "preset": "veryfast"} if codec == "libx264" else {"g": "48"}
    for seed in range(FILES):
        path = folder / f"{seed:03d}.mp4"
        with av.open(str(path), "w") as container:
            stream: Any = container.add_stream(codec, rate=RATE, options=options)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
            stream.bit_rate = 3_000_000
            for pixels in moving(seed):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            container.mux(stream.encode(None))
        if codec != "libx264" and seed % 2:
            data = bytearray(path.read_bytes())
            at = data.index(b"tkhd") + 44  # the display matrix (ISO/IEC 14496-12, 8.3.2)
            struct.pack_into(">9i", data, at, 0, 1 << 16, 0, -1 << 16, 0, 0, 0, 0, 1 << 30)
            path.write_bytes(data)


def built(source: Path, target: Path, workers: int) -> float:
    """Build shards of a folder; return files a second and core."""
    from data_prep.build import build
    from data_prep.compose import compose

    words = [f"input={source}", f"output={target}", f"workers={workers}", "fresh=true"]
    began = time.monotonic()
    with open("/dev/null", "w") as nowhere:
        build(compose(words), Console(file=nowhere))
    return FILES / (time.monotonic() - began) / workers


def by_ffmpeg(source: Path, target: Path) -> float:
    """Transcode a folder with ffmpeg's command, a file at a time; return files a second."""
    target.mkdir(exist_ok=True)
    began = time.monotonic()
    for path in sorted(source.iterdir()):  # it turns a picture upright by itself
        words = ["ffmpeg", "-threads", "1", "-i", str(path), "-vf", PLAIN, *X264, *LIMITS, str(target / path.name)]
        subprocess.run(words, check=True)
    return FILES / (time.monotonic() - began)


def parts(source: Path, target: Path) -> str:
    """Do the units of a folder in this process; return the share of the time that each step takes."""
    from data_prep import encode, files, pack, probe, shots, transcode
    from data_prep.build import plan
    from data_prep.compose import compose
    from data_prep.workers import do_unit

    spent: Counter[str] = Counter()
    inside: list[str] = []

    def clocked(name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        """Add to `name` what a call takes, and take it away from what called it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            inside.append(name)
            began = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                took = time.perf_counter() - began
                spent[name] += took
                inside.pop()
                if inside:
                    spent[inside[-1]] -= took

        return call

    def stepped(name: str, work: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        """The same for each item of an iterator."""

        def items(*args: Any, **kwargs: Any) -> Iterator[Any]:
            step, end = clocked(name, next), object()
            found = work(*args, **kwargs)
            while (item := step(found, end)) is not end:
                yield item

        return items

    clocks: list[tuple[Any, str, Callable[..., Any]]] = [
        (probe, "decoded", stepped("probe: decoding", probe.decoded)),
        (probe, "hash_file", clocked("hash", probe.hash_file)),
        (shots.CutFinder, "watch", clocked("looking for cuts", shots.CutFinder.watch)),
        (transcode, "decoded", stepped("decoding again", transcode.decoded)),
        (transcode, "converted", stepped("filters", transcode.converted)),
        (encode.Encoder, "add", clocked("x264", encode.Encoder.add)),
        (encode.Encoder, "finish", clocked("x264", encode.Encoder.finish)),
        (files, "score", clocked("scores", files.score)),
        (pack, "pack", clocked("packing", pack.pack)),
    ]
    config = compose([f"input={source}", f"output={target}"])
    units = plan(config).units
    for place, name, work in clocks:
        mock.patch.object(place, name, work).start()
    try:
        began = time.perf_counter()
        for number, unit in enumerate(units):
            do_unit(target, number, unit, {})
        pack.pack(target, range(len(units)), target / "shards", max_bytes=256 << 20, report=pack.Report())
        whole = time.perf_counter() - began
    finally:
        mock.patch.stopall()
    spent["the rest"] = whole - sum(spent.values())
    return ", ".join(f"{name} {took / whole:.0%}" for name, took in spent.most_common())


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} ({min(values):.2f}-{max(values):.2f})"


def measure() -> list[dict[str, str]]:
    """Return a row for each kind of file and way of doing it."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        for kind, codec in (("encoded anew", "mpeg4"), ("copied", "libx264")):
            source = place / codec
            source.mkdir()
            write(source, codec)
            ways: dict[str, Callable[[], float]] = {
                "ours, 1 worker": lambda: built(source, place / "out", 1),  # noqa: B023 - called in this turn
                "ours, 2 workers": lambda: built(source, place / "out", 2),  # noqa: B023 - called in this turn
            }
            if codec == "mpeg4" and shutil.which("ffmpeg"):
                ways["ffmpeg, the transcoding alone"] = lambda: by_ffmpeg(source, place / "theirs")  # noqa: B023
            found: dict[str, list[float]] = {name: [] for name in ways}
            for _ in range(ROUNDS):
                for name, way in ways.items():
                    found[name].append(way())
            alone = found["ours, 1 worker"]
            for name, speeds in found.items():
                ratio = median(a / b for a, b in zip(alone, speeds, strict=True))
                rows.append(
                    {"files": kind, "by": name, "files/s/core": spread(speeds), "1 worker / this": f"{ratio:.2f}"}
                )
            rows[-len(found)]["where the time goes"] = parts(source, place / f"parts-{codec}")
    if not shutil.which("ffmpeg"):
        rows.append({"files": "encoded anew", "by": "ffmpeg", "files/s/core": "not installed here"})
    return [{"where the time goes": ""} | row for row in rows]


if __name__ == "__main__":
    import pprint

    pprint.pp(measure(), width=160)
