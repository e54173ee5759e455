"""Promises of the scores: each is what the picture was made to show."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from prep_clips import moving, picture, prepared, write

from data_prep.encode import encode_png
from data_prep.score import score
from data_prep.similar import BITS, duplicates

HEIGHT, WIDTH = 120, 160


def scored(tmp_path: Path, frames: list[np.ndarray], rate: int = 20) -> dict:
    """Return the scores of a clip of these frames as a build stores them."""
    (sample,), _ = prepared(write(tmp_path / "a.mkv", frames, rate=rate), detect=False)
    return sample.record["scores"]


def textured(seed: int = 0, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Return a picture full of detail whose halves fit together when it is rolled."""
    noise = np.random.default_rng(seed).integers(40, 255, (height // 4, width // 4, 3)).astype(np.uint8)
    return np.kron(noise, np.ones((4, 4, 1), np.uint8))


def test_black_frames_are_counted_and_a_black_clip_is_no_letterbox(tmp_path: Path) -> None:
    dark = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    scores = scored(tmp_path, [dark] * 10 + [textured()] * 30)
    assert scores["black"] == pytest.approx(0.25) and scores["letterbox"] == 0
    scores = scored(tmp_path, [dark] * 20)
    assert scores["black"] == 1 and scores["letterbox"] == 0


@pytest.mark.parametrize(("top", "left"), [(0, 0), (20, 0), (0, 30), (12, 16)])
def test_letterbox_is_the_share_of_the_bars(tmp_path: Path, top: int, left: int) -> None:
    frames = []
    for frame in moving(20, HEIGHT - 2 * top, WIDTH - 2 * left):
        frames.append(np.pad(frame, ((top, top), (left, left), (0, 0))))
    bars = 1 - (HEIGHT - 2 * top) * (WIDTH - 2 * left) / (HEIGHT * WIDTH)
    assert scored(tmp_path, frames)["letterbox"] == pytest.approx(bars, abs=0.02)


def test_a_dark_scene_between_bright_ones_is_no_bar(tmp_path: Path) -> None:
    night = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    night[40:80, 50:90] = 200
    assert scored(tmp_path, [night] * 10)["letterbox"] > 0.8
    assert scored(tmp_path, [night] * 10 + [textured()] * 10)["letterbox"] == 0


def test_a_slide_is_static_and_a_pan_is_not(tmp_path: Path) -> None:
    assert scored(tmp_path, [textured()] * 40)["static"] == 1
    pan = [np.roll(textured(), 2 * step, axis=1) for step in range(40)]
    assert scored(tmp_path, pan)["static"] == 0
    assert scored(tmp_path, [textured()] * 20 + pan[1:21])["static"] == pytest.approx(19 / 39, abs=0.03)
    crawl = [textured().copy() for _ in range(20)]
    for step, frame in enumerate(crawl):
        frame[50:54, 20 + 4 * step : 24 + 4 * step] = 255 * (step % 2)  # a small thing on a large picture
    assert scored(tmp_path, crawl)["static"] == 0


@pytest.mark.parametrize(("pixels", "rate"), [(1, 20), (3, 20), (3, 10)])
def test_motion_is_the_pan_in_diagonals_a_second(tmp_path: Path, pixels: int, rate: int) -> None:
    pan = [np.roll(textured(), pixels * step, axis=1) for step in range(32)]
    scores = scored(tmp_path, pan, rate)
    assert scores["motion"] == pytest.approx(pixels * rate / np.hypot(HEIGHT, WIDTH), rel=0.1)


def test_motion_is_nothing_where_nothing_moves(tmp_path: Path) -> None:
    assert scored(tmp_path, [textured()] * 30)["motion"] < 0.002


def test_the_more_a_picture_is_blurred_the_higher_its_blur(tmp_path: Path) -> None:
    levels = []
    for radius in (0, 1, 2, 4):
        soft = cv2.GaussianBlur(textured(), (0, 0), radius) if radius else textured()
        levels.append(score(encode_png(soft), fps=1, image=True)["blur"])
    assert levels == sorted(levels) and levels[0] < 0.1 and levels[-1] > 0.9
    plain = np.full((HEIGHT, WIDTH, 3), 128, np.uint8)
    assert score(encode_png(plain), fps=1, image=True)["blur"] == 1


def test_a_still_has_no_scores_of_movement() -> None:
    scores = score(encode_png(textured()), fps=1, image=True)
    assert set(scores) == {"black", "letterbox", "blur", "phash"} and len(scores["phash"]) == 48


def test_a_recompressed_rescaled_brighter_copy_is_a_near_duplicate_and_another_clip_is_not(tmp_path: Path) -> None:
    clips = {}
    for name, seed in (("one", 1), ("two", 2), ("three", 3)):
        clips[name] = [np.roll(picture(HEIGHT, WIDTH, seed), 2 * step, axis=1) for step in range(20)]
    clips["copy"] = [cv2.resize(frame, (96, 72), interpolation=cv2.INTER_AREA) // 8 * 8 + 6 for frame in clips["two"]]
    hashes = [(name, scored(tmp_path, frames)["phash"], 1.0) for name, frames in clips.items()]
    assert duplicates(hashes) == {"copy": "two"}
    assert duplicates([(name, bits, 1.0 + (name == "copy")) for name, bits, _ in hashes]) == {}


def test_every_pair_within_the_limit_is_found_and_none_beyond_it() -> None:
    draws = np.random.default_rng(0)
    for changed in (0, 1, BITS // 2, BITS, BITS + 1):
        for _ in range(50):
            bits = int.from_bytes(draws.bytes(24), "big")
            other = bits
            for place in draws.choice(192, changed, replace=False):
                other ^= 1 << int(place)
            found = duplicates([("a", f"{bits:048x}", 2.0), ("b", f"{other:048x}", 2.0)])
            assert found == ({"b": "a"} if changed <= BITS else {})
