"""Promises about real clips of mixed size, shape, rate, codec and condition (../shared/media)."""

from __future__ import annotations

import io
import json
import struct
from collections import defaultdict
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep.__main__ import main
from soratrain.data.reading import read_manifest
from soratrain.data.shards import ShardReader

MEDIA = Path(__file__).resolve().parents[3] / "shared" / "media"
DAMAGED = "corrupted.mp4"
pytestmark = [
    pytest.mark.media,
    pytest.mark.full,
    pytest.mark.skipif(not MEDIA.is_dir(), reason=f"the real clips are not at {MEDIA}"),
]

# what players show: width, height, frames, frames a second
SHOWN = {
    "arm_wrestling.mp4": (426, 256, 280, Fraction(28)),
    "bt709_full_range.mp4": (1280, 720, 30, Fraction(30)),
    "cog1.mp4": (720, 480, 49, Fraction(8)),
    "cog4.mp4": (720, 480, 49, Fraction(8)),
    "dj3.mp4": (362, 640, 1190, Fraction(24)),
    "h264_10bits.mp4": (200, 200, 30, Fraction(30)),
    "hiker.mp4": (720, 480, 49, Fraction(8)),
    "horse.mp4": (720, 480, 49, Fraction(8)),
    "kitten.mp4": (720, 480, 49, Fraction(8)),
    "lavila.mp4": (384, 288, 60, Fraction(30)),
    "mm_test.mp4": (456, 256, 300, Fraction(30)),
    "nasa_13013.mp4": (480, 270, 390, Fraction(30000, 1001)),
    "pancake.mkv": (426, 240, 310, Fraction(30)),
    "rot_180.mov": (568, 320, 3, Fraction(30)),
    "rot_90.mov": (320, 568, 3, Fraction(30)),
    "sg_sample_demo_1.mp4": (640, 360, 243, Fraction(25)),
    "structuralize.mp4": (426, 240, 300, Fraction(30000, 1001)),
    "test.avi": (320, 240, 164, Fraction(25)),
    "train_running.mp4": (720, 480, 49, Fraction(8)),
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media") / "shards"
    assert main([f"input={MEDIA}", f"output={folder}"]) == 0
    return folder


@pytest.fixture(scope="module")
def clips(out: Path) -> dict[str, list[tuple[dict, bytes]]]:
    """Return (K.json, media bytes) of every clip by source, in the order of time."""
    reader, found = ShardReader(out), defaultdict(list)
    for row in read_manifest(out).rows():
        record = json.loads(reader.read(row.shard, row.json_offset, row.json_length))
        found[record["source"]["uri"]].append((record, reader.read(row.shard, row.media_offset, row.media_length)))
    return {uri: sorted(items, key=lambda item: item[0]["source"]["start_us"]) for uri, items in found.items()}


def test_every_whole_file_gets_in_with_its_size_rate_and_length(clips: dict[str, list[tuple[dict, bytes]]]) -> None:
    assert set(clips) == {*SHOWN, DAMAGED}
    for uri, (width, height, frames, rate) in SHOWN.items():
        videos = [record["video"] for record, _ in clips[uri]]
        assert {(video["w"], video["h"], Fraction(*video["fps"])) for video in videos} == {(width, height, rate)}, uri
        assert sum(video["frames"] for video in videos) == frames, uri
        sources = [record["source"] for record, _ in clips[uri]]
        assert sources[0]["start_us"] == 0 and abs(sources[-1]["end_us"] / 1e6 - frames / rate) < 1e-3, uri
        assert all(a["end_us"] == b["start_us"] for a, b in pairwise(sources)), uri


def test_every_clip_decodes_to_what_its_header_says(clips: dict[str, list[tuple[dict, bytes]]]) -> None:
    for uri, items in clips.items():
        for record, media in items:
            video = record["video"]
            with av.open(io.BytesIO(media)) as file:
                stream = file.streams.video[0]
                frames = list(file.decode(stream))
                assert len(file.streams) == 1
            assert len(frames) == video["frames"], uri
            assert {(frame.width, frame.height, frame.format.name) for frame in frames} == {
                (video["w"], video["h"], "yuv420p")
            }
            keys = [index for index, frame in enumerate(frames) if frame.key_frame]
            assert keys[0] == 0 and max(np.diff([*keys, len(frames)])) <= 16, uri
            period = 1 / Fraction(*video["fps"])
            times = [frame.pts * frame.time_base for frame in frames]
            assert all(abs(time - index * period) < period / 100 for index, time in enumerate(times)), uri
            assert frames[0].rotation == 0 and not any(frame.interlaced_frame for frame in frames)


def test_every_picture_is_the_one_that_was_meant(clips: dict[str, list[tuple[dict, bytes]]]) -> None:
    for uri in SHOWN:
        with av.open(str(MEDIA / uri)) as file:
            stream = file.streams.best("video")
            stream.thread_type = "AUTO"
            frames = list(file.decode(stream))
        checked = 0
        for record, media in clips[uri]:
            rate = Fraction(*record["video"]["fps"])
            first = round(record["source"]["start_us"] / 1e6 * rate)
            with av.open(io.BytesIO(media)) as file:
                made = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
            for index in range(0, len(made), 25):
                expected = meant(frames[first + index], made[index].shape)
                error = np.abs(made[index].astype(float) - expected).mean()
                assert error < 6, (uri, first + index, error)
                checked += 1
        assert checked


def meant(frame: av.VideoFrame, shape: tuple[int, ...]) -> np.ndarray:
    """Return a source frame as RGB, turned by its display matrix and of a given shape; none of data_prep is used."""
    turned = frame.rotation in (90, -90)
    height, width = (shape[1], shape[0]) if turned else shape[:2]
    pixels = frame.reformat(width=width, height=height, format="rgb24", interpolation="BICUBIC").to_ndarray()
    for item in frame.side_data:
        if item.type.name == "DISPLAYMATRIX":
            matrix = struct.unpack("=9i", bytes(item))
            assert matrix[2] == matrix[5] == 0
    return np.rot90(pixels, round(frame.rotation / 90))  # both count counter-clockwise


def test_rotated_clips_are_told_from_their_other_turns(clips: dict[str, list[tuple[dict, bytes]]]) -> None:
    for uri, quarter in (("rot_90.mov", -1), ("rot_180.mov", 2)):
        with av.open(str(MEDIA / uri)) as file:
            stored = next(file.decode(video=0)).to_ndarray(format="rgb24").astype(float)
        with av.open(io.BytesIO(clips[uri][0][1])) as file:
            made = next(file.decode(video=0)).to_ndarray(format="rgb24")
        errors = {
            turn: np.abs(np.rot90(stored, turn) - made).mean()
            for turn in range(-1, 3)
            if np.rot90(stored, turn).shape == made.shape
        }
        assert min(errors, key=errors.get) == quarter and sorted(errors.values())[1] > 3 * errors[quarter], uri


def test_the_damaged_file_is_reported_and_its_leading_part_is_used(
    out: Path, clips: dict[str, list[tuple[dict, bytes]]]
) -> None:
    failures = [json.loads(line) for line in (out / "failures.jsonl").read_text().splitlines()]
    assert [failure["uri"] for failure in failures] == [DAMAGED]
    assert "damaged after frame" in failures[0]["reason"] and failures[0]["used"]
    ((record, media),) = clips[DAMAGED]
    assert 25 <= record["video"]["frames"] < 50 and record["video"]["orig"]["damage"] == failures[0]["reason"]
    with av.open(str(MEDIA / DAMAGED)) as file:
        sound = [frame.to_ndarray(format="rgb24") for frame in islice(file.decode(video=0), 25)]
    with av.open(io.BytesIO(media)) as file:
        made = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(made) >= len(sound)
    assert all(np.abs(a.astype(int) - b).mean() < 6 for a, b in zip(made[:25], sound, strict=True))


def test_the_funnel_accounts_for_every_file_and_second(out: Path) -> None:
    stats = json.loads((out / "stats.json").read_text())
    for row in stats["funnel"]:
        assert row["in"] - row["out"] == sum(row["dropped"].values()), row
    assert stats["funnel"][0]["in"] == len(SHOWN) + 1
    assert stats["seconds"]["out"] == pytest.approx(stats["seconds"]["in"], abs=0.05)
