"""Promises about what a clip looks like after preparation, whatever it looked like before."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from prep_clips import close, frames_of, moving, picture, prepared, set_turn, turned_by_definition, write

from data_prep.convert import FILTERS, converted
from data_prep.encode import Encoding
from data_prep.records import Picture


def test_a_clip_keeps_its_pixels_rate_and_length(tmp_path: Path) -> None:
    frames = moving(20)
    (sample,), report = prepared(write(tmp_path / "a.mp4", frames, rate=Fraction(30000, 1001)))
    result = frames_of(sample.media)
    assert len(result) == 20 and sample.record["video"]["fps"] == [30000, 1001]
    assert all(close(a, b) for a, b in zip(result, frames, strict=True))
    assert report.failures == [] and sample.how == "encoded"


@pytest.mark.parametrize("turn", list(FILTERS))
def test_every_display_matrix_is_baked_in(tmp_path: Path, turn: tuple[int, int, int, int]) -> None:
    path = write(tmp_path / "a.mp4", [picture()] * 3)
    stored = frames_of(path)[0]
    set_turn(path, turn)
    (sample,), _ = prepared(path)
    expected = turned_by_definition(stored, turn)
    assert close(frames_of(sample.media)[0], expected)
    assert (sample.record["video"]["h"], sample.record["video"]["w"]) == expected.shape[:2]
    with av.open(BytesIO(sample.media)) as file:
        assert next(file.decode(video=0)).rotation == 0


def test_pixels_become_square_and_nothing_is_shrunk(tmp_path: Path) -> None:
    (wide,), _ = prepared(write(tmp_path / "a.mp4", [picture()] * 2, aspect=Fraction(3, 2)))
    (tall,), _ = prepared(write(tmp_path / "b.mp4", [picture()] * 2, aspect=Fraction(2, 3)))
    assert frames_of(wide.media)[0].shape == (48, 96, 3)
    assert frames_of(tall.media)[0].shape == (72, 64, 3)


def test_odd_sizes_lose_one_line_and_are_not_scaled(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", [picture(49, 65)] * 2, codec="ffv1", pix_fmt="bgr0")
    (sample,), _ = prepared(path)
    assert close(frames_of(sample.media)[0], picture(49, 65)[:48, :64])


def test_ten_bit_and_444_and_full_range_become_8_bit_420_limited_range_of_the_same_colours(tmp_path: Path) -> None:
    for name, options in {
        "ten": {"pix_fmt": "yuv420p10le"},
        "dense": {"pix_fmt": "yuv444p"},
        "full": {"color_range": 2, "colorspace": 1},
        "rgb": {"codec": "libx264rgb", "pix_fmt": "rgb24", "options": {"crf": "5"}},
    }.items():
        path = write(tmp_path / f"{name}.mp4", [picture()] * 2, **options)  # type: ignore[arg-type]
        (sample,), _ = prepared(path)
        with av.open(BytesIO(sample.media)) as file:
            frame = next(file.decode(video=0))
        assert (frame.format.name, int(frame.color_range), int(frame.colorspace)) == ("yuv420p", 1, 1), name
        assert close(frame.to_ndarray(format="rgb24"), picture(), mean=4), name


FORMATS = {
    "a.gif": {"codec": "gif", "pix_fmt": "rgb8"},
    "a.webm": {"codec": "libvpx-vp9"},
    "a.ts": {"codec": "mpeg2video", "rate": 25, "ticks": range(90, 110)},
    "a.avi": {"codec": "mjpeg", "pix_fmt": "yuvj422p"},
    "a.mov": {"codec": "prores_ks", "pix_fmt": "yuv422p10le"},
    "b.mov": {"codec": "png", "pix_fmt": "rgb24"},
    "a.flv": {"codec": "flv"},
    "a.wmv": {"codec": "wmv2"},
    "gray.mkv": {"codec": "ffv1", "pix_fmt": "gray"},
    "frames.mp4": {"options": {"bf": "3"}},
}


@pytest.mark.parametrize("name", FORMATS)
def test_other_formats_come_in_with_all_frames_at_their_rate(tmp_path: Path, name: str) -> None:
    frames = moving(20, height=64)
    path = write(tmp_path / name, frames, **FORMATS[name])  # type: ignore[arg-type]
    (sample,), report = prepared(path)
    made = frames_of(sample.media)
    assert len(made) == 20 and report.failures == []
    assert Fraction(*sample.record["video"]["fps"]) == FORMATS[name].get("rate", 10)
    assert all(close(blocks(a), blocks(b)) for a, b in zip(made, frames_of(path), strict=True))


def blocks(pixels: np.ndarray) -> np.ndarray:
    """Return the means of 8x8 blocks, in which a GIF's dither is gone."""
    height, width = pixels.shape[:2]
    return pixels.reshape(height // 8, 8, width // 8, 8, 3).mean((1, 3))


def test_frames_before_an_edit_list_are_not_shown_and_the_clock_starts_at_nought(tmp_path: Path) -> None:
    frames = moving(20)
    path = write(tmp_path / "a.mp4", frames, ticks=range(-5, 15))
    (sample,), _ = prepared(path)
    made = frames_of(sample.media)
    assert len(made) == 15 and all(close(a, b) for a, b in zip(made, frames[5:], strict=True))
    assert sample.record["source"]["start_us"] == 0 and sample.how == "encoded"


def test_a_clip_without_a_stated_matrix_looks_as_decoders_show_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [picture(720, 64)] * 20)
    with av.open(str(path)) as file:
        stored = next(file.decode(video=0))
    assert int(stored.colorspace) not in (1, 9)
    (sample,), _ = prepared(path)
    assert close(frames_of(sample.media)[0], stored.to_ndarray(format="rgb24"), mean=2)


def matrix_of(red: float, blue: float) -> np.ndarray:
    """Return what makes levels of Y, Cb and Cr of RGB by a matrix with these weights (H.273, 8.3)."""
    luma = np.array([red, 1 - red - blue, blue])
    rows = [luma, (np.eye(3)[2] - luma) / (1 - blue) / 2, (np.eye(3)[0] - luma) / (1 - red) / 2]
    return np.array([219, 224, 224])[:, None] * rows


@pytest.mark.parametrize(("matrix", "red", "blue"), [(2, 0.299, 0.114), (6, 0.299, 0.114), (9, 0.2627, 0.0593)])
def test_colours_of_another_matrix_come_over_to_the_nearest_level(matrix: int, red: float, blue: float) -> None:
    levels = np.random.default_rng(0).integers(90, 160, (3, 16, 24))
    planes = [np.kron(levels[0], np.ones((2, 2))), levels[1], levels[2]]
    frame = av.VideoFrame.from_ndarray(
        np.concatenate([p.ravel() for p in planes]).reshape(48, 48).astype(np.uint8), "yuv420p"
    )
    frame.colorspace, frame.color_range = matrix, 1
    found = Picture(48, 32, "yuv420p", matrix=matrix)
    (made,) = converted([frame], found, Fraction(1, 10))
    got = [np.array(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width] for plane in made.planes]
    carry = matrix_of(0.2126, 0.0722) @ np.linalg.inv(matrix_of(red, blue))
    exact = np.einsum("ij,jyx->iyx", carry, levels - np.array([16, 128, 128])[:, None, None])
    exact += np.array([16, 128, 128])[:, None, None]
    assert max(np.abs(a - b).max() for a, b in zip((got[0][::2, ::2], *got[1:]), exact, strict=True)) < 0.51


def test_interlaced_video_is_flagged_and_keeps_its_frame_count(tmp_path: Path) -> None:
    frames = moving(6)
    for index, frame in enumerate(frames):
        frame[index % 2 :: 2, 20:30] = 255
    path = write(tmp_path / "a.mp4", frames, options={"x264-params": "tff=1"})
    (sample,), _ = prepared(path)
    assert sample.record["video"]["orig"]["interlaced"]
    result = frames_of(sample.media)
    comb = [np.abs(np.diff(frame[:, 24].astype(int), axis=0)).mean() for frame in (frames[2], result[2])]
    assert len(result) == 6 and comb[1] < comb[0] / 3


def test_a_variable_rate_keeps_its_duration_and_shows_each_frame_when_it_was_shown(tmp_path: Path) -> None:
    ticks = [0, 100, 200, 300, 900, 1000, 1100, 1200, 1500, 1600]
    frames = [np.full((48, 64, 3), 20 + 20 * index, np.uint8) for index in range(10)]
    path = write(tmp_path / "a.mkv", frames, ticks=ticks, time_base=Fraction(1, 1000))
    (sample,), _ = prepared(path, detect=False)
    levels = [round((float(frame.mean()) - 20) / 20) for frame in frames_of(sample.media)]
    assert sample.record["video"]["fps"] == [10, 1]
    assert levels == [0, 1, 2, 3, 3, 3, 3, 3, 3, 4, 5, 6, 7, 7, 7, 8, 9]
    assert not sample.record["video"]["orig"]["constant_rate"]


def test_what_is_already_right_is_copied_byte_for_byte(tmp_path: Path) -> None:
    right = {"options": {"g": "8"}, "color_range": 1, "colorspace": 1}
    path = write(tmp_path / "a.mp4", moving(20), **right)  # type: ignore[arg-type]
    (sample,), _ = prepared(path)
    assert sample.how == "copied" and sample.media == path.read_bytes()
    assert sample.record["video"]["gop"] <= 8 and sample.record["video"]["frames"] == 20


WHY = {
    "gop": "key frames more than 16 apart",
    "cut": "cut from a longer file",
    "turn": "turned, resized or not progressive",
    "range": "another codec or pixel format",
}


@pytest.mark.parametrize("wrong", WHY)
def test_what_is_not_quite_right_is_encoded_and_the_funnel_says_why(tmp_path: Path, wrong: str) -> None:
    settings: dict[str, object] = {"options": {"g": "250" if wrong == "gop" else "8"}}
    path = write(tmp_path / "a.mp4", moving(20), color_range=2 if wrong == "range" else 1, **settings)  # type: ignore[arg-type]
    if wrong == "turn":
        set_turn(path, (-1, 0, 0, -1))
    samples, report = prepared(path, max_seconds=1.0 if wrong == "cut" else 20.0)
    assert {sample.how for sample in samples} == {"encoded"}
    assert report.tallies["transcode"].how == {f"encoded: {WHY[wrong]}": len(samples)}
    assert all("why" not in sample.record["video"] for sample in samples)
    assert sum(len(frames_of(sample.media)) for sample in samples) == 20


def test_encoded_clips_have_key_frames_as_often_as_they_say(tmp_path: Path) -> None:
    (sample,), _ = prepared(write(tmp_path / "a.mp4", [picture()] * 40), encoding=Encoding(gop=12))
    with av.open(BytesIO(sample.media)) as file:
        keys = [index for index, frame in enumerate(file.decode(video=0)) if frame.key_frame]
    assert max(np.diff([*keys, 40])) == sample.record["video"]["gop"] == 12


def test_the_same_file_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(20), rate=25)
    first, second = prepared(path)[0][0], prepared(path)[0][0]
    assert first.media == second.media and first.key == second.key and first.record == second.record
