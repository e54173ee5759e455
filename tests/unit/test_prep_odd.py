"""Promises about videos that are sound but odd: each comes in whole, upright in time, or says why not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from prep_clips import close, frames_of, moving, picture, prepared, write


def same(path: Path, frames: list[np.ndarray], rate: Fraction | int) -> None:
    """Require that a file comes in as one clip of these frames at this rate, without a failure."""
    (sample,), report = prepared(path, detect=False, max_seconds=3600)
    made = frames_of(sample.media)
    assert report.failures == [] and len(made) == len(frames)
    assert Fraction(*sample.record["video"]["fps"]) == rate
    assert all(close(a, b, mean=4) for a, b in zip(made, frames, strict=True))
    with av.open(str(path)) as file:
        assert file.streams.video[0].codec_context.name
    assert sample.record["video"]["gop"] <= 16


def test_one_frame_is_a_clip(tmp_path: Path) -> None:
    same(write(tmp_path / "a.mp4", moving(1)), moving(1), 10)


def test_a_frame_every_two_seconds_keeps_its_rate(tmp_path: Path) -> None:
    same(write(tmp_path / "a.mp4", moving(6), rate=Fraction(1, 2)), moving(6), Fraction(1, 2))


def test_a_group_of_pictures_without_end_is_cut_into_short_ones(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(300), options={"g": "9999", "keyint_min": "9999", "sc_threshold": "0"})
    same(path, moving(300), 10)


def test_timestamps_below_nought_begin_at_nought(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", moving(12), ticks=range(-4, 8))
    same(path, moving(12), 10)


def test_a_transport_stream_that_begins_hours_later_begins_at_nought(tmp_path: Path) -> None:
    frames = moving(20)
    path = write(tmp_path / "a.ts", frames, rate=25, ticks=range(90_000, 90_020))
    (sample,), _ = prepared(path)
    assert sample.record["source"]["start_us"] == 0 and sample.record["source"]["end_us"] == 800_000
    same(path, frames, 25)


def test_of_two_video_streams_the_larger_is_taken(tmp_path: Path) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as file:
        streams = [file.add_stream("libx264", rate=10, options={"crf": "10"}) for _ in range(2)]
        pictures = moving(10, 24, 32, seed=1), moving(10, seed=2)
        for stream, frames in zip(streams, pictures, strict=True):
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = "yuv420p"
        for index in range(10):
            for stream, frames in zip(streams, pictures, strict=True):
                file.mux(stream.encode(av.VideoFrame.from_ndarray(frames[index], format="rgb24")))
        for stream in streams:
            file.mux(stream.encode(None))
    (sample,), _ = prepared(path)
    assert (sample.record["video"]["w"], sample.record["video"]["h"]) == (64, 48)
    assert sample.record["video"]["orig"]["stream"] == 1


def test_a_size_that_changes_in_the_middle_ends_the_clip_there_and_is_reported(tmp_path: Path) -> None:
    for name, size in (("a.ts", (48, 64)), ("b.ts", (96, 128))):
        write(tmp_path / name, moving(10, *size), codec="mpeg2video", rate=25)
    both = tmp_path / "both.ts"
    both.write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    samples, report = prepared(both, min_seconds=0.1)
    (failure,) = report.failures
    assert "the picture changes from 64x48" in failure.reason and "to 128x96" in failure.reason
    assert len(samples) == 1 and samples[0].record["video"]["w"] == 64


@pytest.mark.parametrize(("name", "codec"), [("a.mkv", "libsvtav1"), ("a.webm", "libvpx-vp9")])
def test_av1_and_vp9_come_in(tmp_path: Path, name: str, codec: str) -> None:
    frames = moving(12, 64, 96)
    options = {"crf": "10"} | ({"svtav1-params": "tune=0"} if codec == "libsvtav1" else {})
    same(write(tmp_path / name, frames, codec=codec, options=options), frames, 10)


def test_a_black_clip_and_a_slide_come_in_with_scores_that_say_so(tmp_path: Path) -> None:
    (black,), _ = prepared(write(tmp_path / "a.mp4", [np.zeros((48, 64, 3), np.uint8)] * 12))
    (slide,), _ = prepared(write(tmp_path / "b.mp4", [picture()] * 12))
    assert black.record["scores"]["black"] == 1 and slide.record["scores"]["static"] == 1
