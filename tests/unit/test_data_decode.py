from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import pytest
from data_tiny import grey, mp4, pixels, png

from soratrain.data.assignment import Bucket
from soratrain.data.decode import (
    ByteBudget,
    Window,
    crop,
    decode,
    load_clip,
    load_whole,
    pick,
    scale,
    scaled_size,
    to_rgb,
)
from soratrain.errors import DataError

RATE = Fraction(24000, 1001)


def levels(clip: np.ndarray) -> list[int]:
    return [int(value) for value in np.median(clip.reshape(len(clip), -1), axis=1)]


def close(clip: np.ndarray, frames: list[int], number: int = 0) -> bool:
    return np.abs(np.array(levels(clip)) - [grey(number, frame) for frame in frames]).max() <= 3


def test_a_clip_of_its_buckets_size_comes_whole_and_in_order():
    data = mp4(pixels(0, 32, 48, 17), RATE)
    clip = load_clip(data, fps=RATE, frames=17, bucket=Bucket(32, 48, 17), draw=5)
    assert clip.shape == (17, 32, 48, 3) and clip.dtype == np.uint8 and clip.flags.c_contiguous
    assert close(clip, list(range(17)))


@pytest.mark.parametrize("stride", [1, 2, 3])
def test_frames_are_consecutive_at_the_native_rate_or_an_integer_fraction(stride):
    data = mp4(pixels(0, 32, 32, 50), RATE)
    starts = set()
    for draw in range(12):
        bucket = Bucket(32, 32, 9)
        start = Window.of(50, bucket, stride, draw).start
        clip = load_clip(data, fps=RATE, frames=50, bucket=bucket, stride=stride, draw=draw)
        assert close(clip, [start + turn * stride for turn in range(9)])
        starts.add(start)
    assert len(starts) > 6


def test_seeking_gives_the_frames_that_decoding_from_the_start_gives():
    data = mp4(pixels(0, 32, 32, 120), RATE)
    whole = load_whole(data, fps=RATE, frames=120, bucket=Bucket(32, 32, 5))
    for draw in range(8):
        start = Window.of(120, Bucket(32, 32, 5), 1, draw).start
        clip = load_clip(data, fps=RATE, frames=120, bucket=Bucket(32, 32, 5), draw=draw)
        assert (clip == whole[start : start + 5]).all()


@pytest.mark.parametrize("form", ["mpegts", "flv", "mpeg", "mp4", "matroska"])
def test_seeking_in_any_container_gives_the_frames_of_their_numbers(form):
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=form) as file:
        codec, options = ("mpeg2video", {}) if form == "mpeg" else ("libx264", {"preset": "fast"})
        stream = file.add_stream(codec, rate=25, options=options | {"bf": "2", "g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for image in pixels(0, 48, 64, 60):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        file.mux(stream.encode(None))
    whole = to_rgb(decode(buffer.getvalue(), fps=Fraction(25), count=60))
    for start in range(32, 60):
        assert (to_rgb(decode(buffer.getvalue(), fps=Fraction(25), start=start))[0] == whole[start]).all(), start


def test_colours_survive():
    video = np.empty((5, 32, 32, 3), np.uint8)
    video[:] = (220, 40, 90)
    clip = load_clip(mp4(video, Fraction(8)), fps=Fraction(8), frames=5, bucket=Bucket(32, 32, 5))
    assert np.abs(clip.astype(int) - video).max() <= 6


def test_a_gap_in_the_timestamps_shows_the_frame_before_it():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "4"})
        stream.height = stream.width = 32
        for number in (0, 1, 2, 6, 7):
            frame = av.VideoFrame.from_ndarray(pixels(0, 32, 32, 8)[number], format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    clip = load_whole(buffer.getvalue(), fps=Fraction(8), frames=8, bucket=Bucket(32, 32, 5))
    assert close(clip, [0, 1, 2, 2, 2, 2, 6, 7])


def test_an_image_is_a_clip_of_one_frame():
    image = np.arange(32 * 48 * 3, dtype=np.uint8).reshape(32, 48, 3)
    clip = load_clip(png(image), fps=Fraction(1), frames=1, bucket=Bucket(32, 48, 1), draw=1)
    assert (clip[0] == image).all()


def test_larger_frames_are_scaled_to_cover_the_bucket_then_cropped_by_the_draw():
    assert scaled_size(720, 1280, Bucket(48, 80, 1)) == (48, 85)
    assert scaled_size(486, 854, Bucket(480, 848, 1)) == (486, 854)  # less than a cell is left: not scaled
    ramp = np.empty((1, 64, 128, 3), np.uint8)
    ramp[:] = np.arange(0, 256, 2, dtype=np.uint8)[:, None]
    scaled = scale(ramp, Bucket(32, 32, 1))
    assert scaled.shape == (1, 32, 64, 3)
    lefts = {int(crop(scaled, Bucket(32, 32, 1), draw)[0, 0, 0, 0]) for draw in range(40)}
    assert len(lefts) > 10
    assert (crop(scaled, Bucket(32, 32, 1), None) == scaled[:, :, 16:48]).all()
    assert (crop(scaled, Bucket(32, 32, 1), 7) == crop(scaled, Bucket(32, 32, 1), 7)).all()


def test_nothing_is_upsampled_nor_stretched_in_time():
    with pytest.raises(DataError, match="smaller"):
        scaled_size(32, 31, Bucket(32, 32, 1))
    with pytest.raises(DataError, match="shorter"):
        Window.of(16, Bucket(32, 32, 9), 2, 0)


@pytest.mark.parametrize("damage", ["truncated", "random", "empty", "audio"])
def test_damaged_bytes_are_a_data_error(damage):
    data = mp4(pixels(0, 32, 32, 17), RATE)
    rng = np.random.default_rng(0)
    damaged = {
        "truncated": data[: len(data) // 3],
        "random": rng.bytes(500),
        "empty": b"",
        "audio": data.replace(b"vide", b"soun"),
    }[damage]
    with pytest.raises(DataError):
        load_clip(damaged, fps=RATE, frames=17, bucket=Bucket(32, 32, 17))


def test_a_clip_with_fewer_frames_than_the_manifest_says_is_a_data_error():
    with pytest.raises(DataError, match="ends after 9 of 17"):
        load_clip(mp4(pixels(0, 32, 32, 9), RATE), fps=RATE, frames=17, bucket=Bucket(32, 32, 17))


def test_picks_depend_on_draw_and_name_and_reach_every_place():
    assert {pick(draw, "top", 5) for draw in range(100)} == set(range(5))
    assert pick(3, "top", 1000) == pick(3, "top", 1000) != pick(3, "left", 1000)
    assert pick(None, "top", 5) == 2


def test_a_byte_budget_keeps_what_comes_first_and_no_more():
    store = ByteBudget(10)
    for name in "abc":
        store.put(name, name, 4)
    store.put("d", "d", 2)
    assert [store.get(name) for name in "abcd"] == ["a", "b", None, "d"] and store.used == 10
