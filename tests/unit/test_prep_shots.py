"""Promises about where clips begin and end."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest
from prep_clips import close, frames_of, moving, picture, prepared, write
from scenedetect import AdaptiveDetector, FrameTimecode, StatsManager

from data_prep.detector import Detector
from data_prep.records import Cut, Picture, Probe
from data_prep.shots import Cutting, spans


def probed(count: int, rate: int = 10, cuts: tuple[Cut, ...] = (), damage: str = "") -> Probe:
    times = tuple(index / rate for index in range(count))
    return Probe(
        id="0",
        container="mp4",
        codec="h264",
        stream=0,
        streams=1,
        picture=Picture(64, 48, "yuv420p"),
        times=times,
        end=count / rate,
        rate=Fraction(rate),
        constant=True,
        gop=1,
        damage=damage,
        cuts=cuts,
    )


def bounds(probe: Probe, **cutting: float) -> list[tuple[int, int]]:
    return [(span.first, span.stop) for span in spans(probe, Cutting(**cutting))[0]]  # type: ignore[arg-type]


def test_a_file_is_cut_exactly_where_the_picture_changes(tmp_path: Path) -> None:
    frames = moving(12, seed=0) + moving(15, seed=1) + moving(11, seed=5)
    samples, _ = prepared(write(tmp_path / "a.mp4", frames))
    assert [sample.record["video"]["frames"] for sample in samples] == [12, 15, 11]
    times = [(s.record["source"]["start_us"], s.record["source"]["end_us"]) for s in samples]
    assert times == [(0, 1_200_000), (1_200_000, 2_700_000), (2_700_000, 3_800_000)]


def test_cuts_and_their_strengths_are_those_of_pyscenedetect() -> None:
    theirs = AdaptiveDetector(adaptive_threshold=3.0, min_content_val=15.0, min_scene_len=1)
    ours = Detector(adaptive_threshold=3.0, min_content_val=15.0, min_scene_len=1)
    stats = theirs.stats_manager = StatsManager()
    frames = [image for seed in (0, 1, 5, 2) for image in moving(9, seed=seed)]
    found: dict[bool, list[int]] = {True: [], False: []}
    for number, image in enumerate(frames):
        time = FrameTimecode(number, fps=25.0)
        for detector in (theirs, ours):
            found[detector is ours] += [cut.frame_num for cut in detector.process_frame(time, image)]
    assert found[True] == found[False] == [9, 18, 27]
    for number in range(1, len(frames)):
        assert [ours.contents[number]] == stats.get_metrics(FrameTimecode(number, fps=25.0), ["content_val"])


def test_motion_is_not_a_cut(tmp_path: Path) -> None:
    wide = picture(48, 200)
    frames = [wide[:, 3 * index : 3 * index + 64] for index in range(30)]
    assert len(prepared(write(tmp_path / "a.mp4", frames))[0]) == 1


def test_a_whole_file_is_kept_however_short() -> None:
    assert bounds(probed(1), min_seconds=5) == [(0, 1)]


def test_the_rest_of_a_damaged_file_must_be_long_enough() -> None:
    assert bounds(probed(3, damage="cut off"), min_seconds=0.4) == []
    assert bounds(probed(4, damage="cut off"), min_seconds=0.4) == [(0, 4)]


def test_long_shots_are_divided_without_loss() -> None:
    assert bounds(probed(250), max_seconds=10) == [(0, 100), (100, 200), (200, 250)]
    assert bounds(probed(202), max_seconds=10, min_seconds=0.5) == [(0, 68), (68, 135), (135, 202)]
    assert bounds(probed(200), max_seconds=10) == [(0, 100), (100, 200)]


@pytest.mark.parametrize("count", range(1, 400, 7))
def test_dividing_covers_every_frame_once_and_stays_below_the_limit(count: int) -> None:
    parts = bounds(probed(count), max_seconds=3.1, min_seconds=0.7)
    assert parts[0][0] == 0 and parts[-1][1] == count
    assert all(a[1] == b[0] for a, b in pairwise(parts))
    assert all(stop - first <= 31 for first, stop in parts)


def test_parts_between_two_real_cuts_that_are_too_short_are_dropped_and_counted() -> None:
    kept, dropped = spans(probed(50, cuts=(Cut(20, 80.0), Cut(22, 80.0))), Cutting(min_seconds=0.5))
    assert [(span.first, span.stop) for span in kept] == [(0, 20), (22, 50)]
    assert dropped == {"shorter than shots.min_seconds": 1}


def test_a_weak_cut_beside_an_edge_or_another_cut_is_not_believed() -> None:
    assert bounds(probed(50, cuts=(Cut(2, 17.0),))) == [(0, 50)]
    assert bounds(probed(50, cuts=(Cut(48, 17.0),))) == [(0, 50)]
    assert bounds(probed(50, cuts=(Cut(20, 80.0), Cut(22, 17.0)))) == [(0, 20), (20, 50)]
    assert bounds(probed(50, cuts=(Cut(25, 17.0),))) == [(0, 25), (25, 50)]


def test_a_variable_rate_is_cut_by_time_and_not_by_frames() -> None:
    times = (*(index / 10 for index in range(10)), *(1 + index for index in range(10)))
    slow = replace(probed(20), times=times, end=11.0, constant=False)
    assert bounds(slow, max_seconds=4.0) == [(0, 13), (13, 17), (17, 20)]


def test_a_margin_is_cut_off_beside_each_cut_and_not_at_the_files_ends() -> None:
    cuts = (Cut(20, 80.0), Cut(40, 80.0))
    assert bounds(probed(60, cuts=cuts), margin=0.3) == [(0, 17), (23, 37), (43, 60)]
    kept, dropped = spans(probed(60, cuts=(Cut(20, 80.0), Cut(25, 80.0))), Cutting(margin=0.3))
    assert [(span.first, span.stop) for span in kept] == [(0, 17), (28, 60)]
    assert dropped == {"all of it within shots.margin of a cut": 1}


def test_a_long_shot_can_be_strided_into_clips_with_gaps_between_them() -> None:
    assert bounds(probed(600), max_seconds=10, stride=25) == [(0, 100), (250, 350), (500, 600)]
    assert bounds(probed(520), max_seconds=10, stride=25, min_seconds=5) == [(0, 100), (250, 350)]
    assert bounds(probed(90), max_seconds=10, stride=25) == [(0, 90)]


def test_strided_and_trimmed_clips_show_what_their_spans_say(tmp_path: Path) -> None:
    frames = moving(30, seed=0) + moving(24, seed=1)
    settings = {"max_seconds": 1.0, "stride": 1.5, "margin": 0.2}
    samples, _ = prepared(write(tmp_path / "a.mp4", frames), **settings)
    spans = [(s.record["source"]["start_us"] // 100_000, s.record["source"]["end_us"] // 100_000) for s in samples]
    assert spans == [(0, 10), (15, 25), (32, 42), (47, 54)]
    for sample, (first, stop) in zip(samples, spans, strict=True):
        made = frames_of(sample.media)
        assert len(made) == stop - first
        assert all(close(a, b) for a, b in zip(made, frames[first:stop], strict=True))
