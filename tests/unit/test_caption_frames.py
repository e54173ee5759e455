"""Frames shown to a model of pictures: taken by time, of the part that is encoded, no larger than asked."""

from __future__ import annotations

import base64
import io
from fractions import Fraction

import data_tiny
import numpy as np
import pytest
from PIL import Image

from soratrain.captions.frames import Frames, checked, chosen, jpeg_url, told
from soratrain.data.assignment import Bucket
from soratrain.data.decode import load_clip
from soratrain.errors import ConfigError, DataError


def test_frames_are_taken_by_time_and_not_by_number():
    assert chosen(17, 8, 2, 8) == [0, 4, 8, 12, 16]
    assert chosen(33, 16, 2, 8) == [0, 8, 16, 24, 32]  # the same instants at twice the rate
    assert chosen(17, 8, 1, 8) == [0, 8, 16]
    assert chosen(49, 24, 2, 8) == [0, 12, 24, 36, 48]


def test_a_long_clip_is_shown_evenly_and_a_short_one_at_least_once():
    assert chosen(481, 24, 2, 8) == [0, 69, 137, 206, 274, 343, 411, 480]
    assert chosen(1, 8, 2, 8) == [0]
    assert chosen(5, 24, 2, 8) == [2]
    assert chosen(17, 8, 2, 1) == [8]
    assert chosen(3, 1, 100, 8) == [0, 1, 2]


@pytest.mark.parametrize("frames", [21, 121])
def test_what_is_shown_is_what_is_encoded_wherever_the_part_begins(frames):
    video = np.zeros((frames, 48, 96, 3), np.uint8)
    for frame in range(frames):
        video[frame] = 20 + 10 * (frame % 21)
        video[frame, :, :16] = video[frame, :, -16:] = 255  # cropped: the bucket is less wide
    data, bucket = data_tiny.mp4(video, Fraction(8)), Bucket(32, 32, 9)
    given = {"fps": Fraction(8), "frames": frames, "bucket": bucket, "stride": 2}
    shown, encoded = Frames(2.0, 8, 64)(data, **given), load_clip(data, **given)
    assert shown.shape == (5, 48, 48, 3) and shown.dtype == np.uint8  # its own resolution
    assert shown.max() < 245
    for frame, number in enumerate(chosen(9, 4, 2.0, 8)):
        assert shown[frame].mean() == pytest.approx(encoded[number].mean(), abs=1.5)


def test_large_frames_are_made_smaller_and_small_ones_stay():
    frames = np.random.default_rng(0).integers(0, 255, (2, 90, 160, 3), dtype=np.uint8)
    assert Frames(1, 1, 80).fitted(frames).shape == (2, 45, 80, 3)
    assert np.array_equal(Frames(1, 1, 160).fitted(frames), frames)
    assert Frames(1, 1, 80).fitted(frames).mean() == pytest.approx(frames.mean(), abs=1)


def test_a_clip_without_frames_says_so():
    with pytest.raises(DataError):
        Frames(1, 1, 64)(b"", fps=Fraction(8), frames=5, bucket=Bucket(16, 16, 5), stride=1)


def test_a_frame_travels_as_a_jpeg():
    frame = np.full((24, 40, 3), (200, 30, 60), np.uint8)
    url = jpeg_url(frame, 90)
    held = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/jpeg;base64,"))))
    assert held.format == "JPEG" and np.abs(np.asarray(held).astype(int) - frame).max() < 6


def test_the_model_is_told_what_it_sees():
    assert told("Say it.", 5, 2.0) == "These are 5 frames of one video, in order, evenly spread over 2 s. Say it."
    assert told("Say it.", 1, 0.0) == "This is a picture. Say it."
    assert told("Say it.", 1, 0.5) == "This is a picture from the middle of a video of 0.5 s. Say it."


def test_a_style_needs_a_prompt():
    with pytest.raises(ConfigError, match="prompts: is empty"):
        checked({}, None)
    prompts = {"short": "Be short.", "mood": " "}
    assert checked({"short": "Be short."}, None) == ["short"]
    with pytest.raises(ConfigError, match=r"no prompt for 'mood'.*stage.job.prompts.mood"):
        checked(prompts, None)
    with pytest.raises(ConfigError, match="no prompt for 'long'"):
        checked(prompts, ["long"])


@pytest.mark.parametrize(("values", "key"), [((0, 8, 64), "per_second"), ((1, 0, 64), "frames"), ((1, 8, 8), "side")])
def test_a_value_out_of_range_is_refused(values, key):
    with pytest.raises(ConfigError, match=rf"engine\.\w*{key}"):
        Frames(*values)
