"""Promises about timestamps and rates: frames are believed, headers are not."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from prep_clips import moving, picture, write

from data_prep.probe import fit_rate, probe, shown_at
from data_prep.records import Source
from data_prep.shots import CutFinder, Cutting


def look(path: Path):  # noqa: ANN201
    finder = CutFinder(Cutting())
    return probe(Source(path.name, path, "video"), finder.watch, finder.cuts)


def test_frames_are_counted_where_the_header_does_not_say(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a.mkv", moving(17), rate=30))
    assert len(found.times) == 17 and found.rate == 30 and found.constant
    assert found.end == pytest.approx(17 / 30)


@pytest.mark.parametrize(
    "rate", [Fraction(30000, 1001), Fraction(24), Fraction(24000, 1001), Fraction(25, 2), Fraction(1, 2)]
)
@pytest.mark.parametrize("count", [2, 3, 200])
def test_a_constant_rate_is_found_in_timestamps_of_whole_milliseconds(rate: Fraction, count: int) -> None:
    times = [round(index / rate * 1000) / 1000 for index in range(count)]
    assert fit_rate(times, 0.001, [rate]) == (rate, True)


def test_a_constant_rate_is_found_without_any_stated_one() -> None:
    for rate in (Fraction(30000, 1001), Fraction(30), Fraction(24), Fraction(7)):
        assert fit_rate([float(index / rate) for index in range(300)], 1e-5, []) == (rate, True)


def test_a_stated_rate_that_the_frames_do_not_follow_is_not_believed() -> None:
    times = [index / 24 for index in range(50)]
    assert fit_rate(times, 1e-5, [Fraction(30)]) == (Fraction(24), True)


def test_dropped_frames_make_a_rate_variable_even_with_coarse_timestamps() -> None:
    shown = [0, 1, 2, 3, 5, 6, 7, 8, 9, 11, 12, 13]
    assert fit_rate([index / 25 for index in shown], 1 / 25, [Fraction(25)]) == (Fraction(25), False)


def test_decoding_timestamps_count_where_the_others_go_back_and_forth() -> None:
    times, end = shown_at([(1, 1, 1), (2, 2, 1), (4, 3, 1), (3, 4, 1), (5, 5, 1)], 0.04, [Fraction(25)])
    assert times == pytest.approx([0, 0.04, 0.08, 0.12, 0.16]) and end == pytest.approx(0.2)


def test_frames_without_timestamps_follow_the_stated_rate() -> None:
    times, end = shown_at([(None, None, 0)] * 3, 0.04, [Fraction(10)])
    assert times == pytest.approx([0, 0.1, 0.2]) and end == pytest.approx(0.3)


def test_the_longest_distance_between_key_frames_is_measured(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", [picture()] * 30, options={"g": "12", "keyint_min": "12"})
    assert look(path).gop == 12


def test_a_single_frame_is_a_clip_of_its_stated_rate(tmp_path: Path) -> None:
    found = look(write(tmp_path / "a.mp4", moving(1), rate=30))
    assert found.rate == 30 and found.constant and found.end == pytest.approx(1 / 30)
