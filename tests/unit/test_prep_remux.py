"""Promises about streams that are right in a container that is not: nothing is encoded again, and nothing changes."""

from __future__ import annotations

from fractions import Fraction
from io import BytesIO
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from prep_clips import frames_of, moving, prepared, write

from data_prep import remux
from data_prep.encode import Encoding
from data_prep.records import Sample
from soratrain.data.decode import SEEK_FROM, decode

RIGHT: dict[str, Any] = {"options": {"g": "8"}, "rate": 25, "color_range": 1, "colorspace": 1}
DEEP: dict[str, Any] = RIGHT | {"options": {"g": "8", "bf": "3", "b_strategy": "0"}}


def rolling(count: int) -> list[np.ndarray]:
    """Return frames that no two of are alike, and that move, so that each depends on those it was predicted from."""
    return [np.roll(frame, 3 * index, 1) for index, frame in enumerate(moving(count))]


def packets_of(media: bytes | Path) -> list[bytes]:
    """Return the packets of the first video stream."""
    with av.open(BytesIO(media) if isinstance(media, bytes) else str(media)) as file:
        return [bytes(packet) for packet in file.demux(file.streams.video[0]) if packet.size]


def pictures(packets: list[bytes], prefix: int) -> list[bytes]:
    """Return the coded pictures in packets of either form (see `remux.units_of`)."""
    return [unit for packet in packets for unit in remux.units_of(packet, prefix) if unit[0] & 31 in (1, remux.IDR)]


def require_exact(sample: Sample, path: Path) -> None:
    """Require that a sample shows the very frames of its source, wherever the loader begins to read it."""
    expected, video = frames_of(path), sample.record["video"]
    made = frames_of(sample.media)
    assert len(made) == len(expected) == video["frames"]
    assert all(np.array_equal(a, b) for a, b in zip(made, expected, strict=True))
    for start in (0, 5, *range(SEEK_FROM, len(expected))):
        (frame,) = decode(sample.media, fps=Fraction(*video["fps"]), start=start)
        assert np.array_equal(frame.to_ndarray(format="rgb24"), expected[start]), start


@pytest.mark.parametrize("name", ["a.mkv", "a.mov", "a.ts", "a.flv", "a.avi", "a.m4v"])
def test_a_right_stream_in_another_container_keeps_its_packets(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, rolling(20), **RIGHT)
    (sample,), report = prepared(path, detect=False)
    assert sample.how == "remuxed" and report.tallies["transcode"].how == {"remuxed": 1}
    prefix = 0 if path.suffix in (".ts", ".avi") else 4  # start codes, or lengths
    assert pictures(packets_of(sample.media), 4) == pictures(packets_of(path), prefix)
    require_exact(sample, path)
    with av.open(BytesIO(sample.media)) as file:
        assert [stream.type for stream in file.streams] == ["video"] and "mp4" in file.format.name
        assert [frame.pts * frame.time_base for frame in file.decode(video=0)] == [Fraction(i, 25) for i in range(20)]


@pytest.mark.parametrize("name", ["a.mkv", "a.mov", "a.ts", "a.flv"])
def test_b_frames_come_out_in_their_order_wherever_reading_begins(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, rolling(60), **DEEP)
    with av.open(str(path)) as file:
        stamps = [packet.pts for packet in file.demux(video=0) if packet.size]
    assert stamps != sorted(stamps), "the test needs packets out of order"
    (sample,), _ = prepared(path, detect=False)
    assert sample.how == "remuxed" and sample.record["video"]["gop"] == 8
    require_exact(sample, path)


def test_sound_is_left_out_of_an_mp4_without_touching_the_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", rolling(20), audio=True, **RIGHT)
    (sample,), _ = prepared(path, detect=False)
    assert sample.how == "remuxed" and packets_of(sample.media) == packets_of(path)
    with av.open(BytesIO(sample.media)) as file:
        assert [stream.type for stream in file.streams] == ["video"]
    require_exact(sample, path)


def test_a_clock_that_begins_late_or_jitters_begins_at_nought_and_is_even(tmp_path: Path) -> None:
    late = write(tmp_path / "a.ts", rolling(20), ticks=range(90_000, 90_020), **RIGHT)
    ticks = [40 * index + (index % 3) for index in range(20)]
    rough = write(tmp_path / "b.mkv", rolling(20), ticks=ticks, time_base=Fraction(1, 1000), **RIGHT)
    for path in (late, rough):
        (sample,), _ = prepared(path, detect=False)
        assert sample.how == "remuxed" and sample.record["source"]["start_us"] == 0
        require_exact(sample, path)


def test_the_same_file_is_remuxed_to_the_same_bytes(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", rolling(20), **DEEP)
    first, second = prepared(path)[0][0], prepared(path)[0][0]
    assert first.how == "remuxed" and first.media == second.media and first.record == second.record


def encoded(path: Path, frames: int, **cutting: Any) -> None:
    """Require that a file comes in with all its frames, but encoded."""
    samples, report = prepared(path, detect=False, **cutting)
    assert {sample.how for sample in samples} == {"encoded"} and report.failures == []
    assert sum(len(frames_of(sample.media)) for sample in samples) == frames


def test_long_groups_cuts_and_rates_that_vary_are_encoded(tmp_path: Path) -> None:
    encoded(write(tmp_path / "long.mkv", rolling(40), **RIGHT | {"options": {"g": "40"}}), 40)
    encoded(write(tmp_path / "cut.mkv", rolling(20), **RIGHT), 20, max_seconds=0.4)
    ticks = [*range(0, 400, 40), *range(600, 1000, 40)]
    gap = write(tmp_path / "gap.mkv", rolling(20), ticks=ticks, time_base=Fraction(1, 1000), **RIGHT)
    encoded(gap, 25)


def test_an_edit_list_is_obeyed_and_one_that_begins_between_key_frames_is_encoded(tmp_path: Path) -> None:
    encoded(write(tmp_path / "a.mov", rolling(20), ticks=range(-5, 15), **RIGHT), 15)
    path = write(tmp_path / "b.mov", rolling(20), ticks=range(-8, 12), **RIGHT)
    (sample,), _ = prepared(path, detect=False)
    assert sample.how == "remuxed" and sample.record["video"]["frames"] == 12
    require_exact(sample, path)


@pytest.mark.parametrize("leading", ["", ":b-adapt=1:b-bias=-100"])  # with frames shown before a key frame, or none
@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_open_groups_are_encoded_since_reading_cannot_begin_at_their_key_frames(
    tmp_path: Path, leading: str, name: str
) -> None:
    options = DEEP["options"] | {"x264-params": f"open-gop=1{leading}"}
    path = write(tmp_path / name, rolling(40), **DEEP | {"options": options})
    with av.open(str(path)) as file:
        assert sum(frame.key_frame for frame in file.decode(video=0)) > 1, "the test needs open groups"
    encoded(path, 40)


def test_parameter_sets_that_change_in_the_middle_are_encoded(tmp_path: Path) -> None:
    first = write(tmp_path / "a.ts", rolling(8), **RIGHT)
    other = RIGHT | {"options": {"g": "8", "x264-params": "ref=1:cabac=0"}, "ticks": range(8, 16)}
    second = write(tmp_path / "b.ts", rolling(8), **other)
    both = tmp_path / "both.ts"
    both.write_bytes(first.read_bytes() + second.read_bytes())
    encoded(both, 16)


def test_b_frames_in_avi_that_has_no_clock_for_them_are_encoded(tmp_path: Path) -> None:
    encoded(write(tmp_path / "a.avi", rolling(20), **DEEP), 20)


@pytest.mark.parametrize("fault", ["lost", "swapped", "late"])
def test_a_result_that_does_not_show_its_source_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    muxed = remux.muxed

    def wrong(stream: Any, packets: list[remux.Packet], rate: Fraction) -> bytes:
        if fault == "lost":
            packets = packets[:-1]
        elif fault == "swapped":
            packets = [*packets[8:16], *packets[:8], *packets[16:]]
            packets = [remux.Packet(packet.data, place, packet.key) for place, packet in enumerate(packets)]
        else:
            rate = rate / 2
        return muxed(stream, packets, rate)

    path = write(tmp_path / "a.mkv", rolling(20), **RIGHT)
    monkeypatch.setattr(remux, "muxed", wrong)
    encoded(path, 20)


def test_a_longer_limit_on_groups_lets_more_files_through(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", rolling(40), **RIGHT | {"options": {"g": "40", "sc_threshold": "0"}})
    (sample,), _ = prepared(path, detect=False, encoding=Encoding(gop=40))
    assert sample.how == "remuxed" and sample.record["video"]["gop"] == 40
