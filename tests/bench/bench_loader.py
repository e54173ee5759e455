"""Clips a second from local shards, one process: ours, webdataset with PyAV, and seeking in the long-GOP originals."""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import numpy as np
import webdataset

from soratrain.data.buckets import Native
from soratrain.data.datamodule import VideoData
from soratrain.data.reading import read_manifest

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
TITLE = "Loading clips of 320x192, 17 frames, from local shards"
CLIPS, ROUNDS, FRAMES, HEIGHT, WIDTH = 64, 5, 17, 192, 320


def moving(frames: int, seed: int) -> np.ndarray:
    """Return smooth noise that drifts, uint8 `[T, H, W, 3]`: it costs a codec about what real footage does."""
    random = np.random.default_rng(seed)
    small = random.integers(0, 256, (HEIGHT // 8, WIDTH // 8, 3), dtype=np.uint8)
    field = np.kron(small, np.ones((8, 8, 1), np.uint8))
    return np.stack([np.roll(field, (frame, 2 * frame), (0, 1)) for frame in range(frames)])


def long_gop(video: np.ndarray) -> bytes:
    """Return H.264 with one key frame."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"g": "9999", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return buffer.getvalue()


def frames_of(data: bytes, start: int) -> np.ndarray:
    """Decode as a plain pipeline does: seek before the clip, decode on to its end, on one thread."""
    with av.open(io.BytesIO(data)) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        if start:
            container.seek(int(start / Fraction(8) / stream.time_base), stream=stream)
        found: list[np.ndarray] = []
        for frame in container.decode(stream):
            if round(frame.time * 8) >= start:
                found.append(frame.to_ndarray(format="rgb24"))
            if len(found) == FRAMES:
                break
    return np.stack(found)


def measure() -> list[dict[str, str]]:
    """Return a row for each way of loading."""
    from data_tiny import fields, mp4, write

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        head = fields(HEIGHT, WIDTH, FRAMES, "mp4")
        write(folder, [(head, mp4(moving(FRAMES, seed), Fraction(8))) for seed in range(CLIPS)], max_bytes=1 << 24)
        urls = [str(folder / shard) for shard in read_manifest(folder).shards]
        original = long_gop(np.concatenate([moving(FRAMES, seed) for seed in range(16)]))
        data = VideoData(shards=place, buckets=Native(), seed=0, max_steps=10**6, batch_size=4, cache=0)
        data.items()

        def ours() -> int:
            return sum(len(batch.keys) for batch in data.loader(0, CLIPS // 4))

        def theirs() -> int:
            dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            decoded = dataset.map(lambda sample: frames_of(sample["mp4"], 0)).batched(4, collation_fn=np.stack)
            return sum(len(batch) for batch in decoded)

        def random_access() -> int:
            return sum(len(frames_of(original, FRAMES * (number * 5 % 16))) > 0 for number in range(CLIPS // 4))

        ways: dict[str, Callable[[], int]] = {
            "ours": ours,
            "webdataset + PyAV": theirs,
            "seeking in long-GOP originals": random_access,
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                began = time.monotonic()
                count = way()
                assert count == (CLIPS if way is not random_access else CLIPS // 4)
                speeds[name].append(count / (time.monotonic() - began))
    return [
        {
            "loader": name,
            "clips/s": f"{median(found):.1f} ({min(found):.1f}-{max(found):.1f})",
            "ours / this": f"{median(a / b for a, b in zip(speeds['ours'], found, strict=True)):.2f}",
        }
        for name, found in speeds.items()
    ]


if __name__ == "__main__":
    import pprint

    pprint.pp(measure(), width=160)
