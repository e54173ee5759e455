"""Clips a second from local shards: ours, webdataset with PyAV, and seeking in the long-GOP originals.

Each way decodes the same frames on one thread a process and stacks them as uint8 RGB, four clips a batch. Ours also
checks each clip's CRC-32, chooses a caption and keeps the plan's order; webdataset takes the shards as they lie.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path
from statistics import median

import av
import numpy as np
import torch
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


def stacked(clips: list[np.ndarray]) -> torch.Tensor:
    """Return clips as one tensor."""
    return torch.from_numpy(np.stack(clips))


def beside(name: str) -> str:
    """Return which of our ways one is compared with."""
    return "ours, 2 workers" if name.endswith("2 workers") else "ours"


def passes(workers: int) -> int:
    """Return how often all clips are loaded: often enough that what workers have ready at first counts little."""
    return 4 if workers else 1


def timed(videos: Iterable[torch.Tensor]) -> float:
    """Return clips a second from the second batch on, so that the start of workers is not in it."""
    count, began = 0, None
    for video in videos:
        assert video.shape == (4, FRAMES, HEIGHT, WIDTH, 3) and video.dtype == torch.uint8
        if began is None:
            began = time.monotonic()
        else:
            count += len(video)
    assert began is not None and count % CLIPS == CLIPS - 4
    return count / (time.monotonic() - began)


def measure() -> list[dict[str, str]]:
    """Return a row for each way of loading."""
    from data_tiny import fields, mp4, write

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        head = fields(HEIGHT, WIDTH, FRAMES, "mp4")
        media = [mp4(moving(FRAMES, seed), Fraction(8)) for seed in range(CLIPS)]
        # four shards alike: webdataset deals out whole shards to its workers
        write(folder, [(head, data) for data in media], max_bytes=int(16.8 * sum(map(len, media)) / CLIPS))
        manifest = read_manifest(folder)
        assert np.bincount(manifest.shard).tolist() == [16] * 4
        urls = [str(folder / shard) for shard in manifest.shards]
        original = long_gop(np.concatenate([moving(FRAMES, seed) for seed in range(16)]))

        def ours(workers: int) -> Callable[[], float]:
            buckets = Native()
            data = VideoData(
                shards=place, buckets=buckets, seed=0, max_steps=10**6, batch_size=4, workers=workers, cache=0
            )
            data.items()
            return lambda: timed(batch.video for batch in data.loader(0, CLIPS // 4 * passes(workers)))

        def theirs(workers: int) -> Callable[[], float]:
            dataset = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            batches = dataset.map(lambda sample: frames_of(sample["mp4"], 0)).batched(4, collation_fn=stacked)
            batches = batches.repeat(passes(workers))
            return lambda: timed(webdataset.WebLoader(batches, batch_size=None, num_workers=workers))

        def random_access() -> float:
            began = time.monotonic()
            for number in range(CLIPS // 4):
                assert len(frames_of(original, FRAMES * (number * 5 % 16))) == FRAMES
            return CLIPS // 4 / (time.monotonic() - began)

        ways: dict[str, Callable[[], float]] = {
            "ours": ours(0),
            "webdataset + PyAV": theirs(0),
            "ours, 2 workers": ours(2),
            "webdataset + PyAV, 2 workers": theirs(2),
            "seeking in long-GOP originals": random_access,
        }
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(ROUNDS):
            for name, way in ways.items():
                speeds[name].append(way())
    return [
        {
            "loader": name,
            "clips/s": f"{median(found):.1f} ({min(found):.1f}-{max(found):.1f})",
            "ours / this": f"{median(a / b for a, b in zip(speeds[beside(name)], found, strict=True)):.2f}",
        }
        for name, found in speeds.items()
    ]


if __name__ == "__main__":
    import pprint

    pprint.pp(measure(), width=160)
