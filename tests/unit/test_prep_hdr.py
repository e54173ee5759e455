"""Promises of bringing HDR to the standard range: points that the standards state, and a real 10-bit file."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from prep_clips import frames_of, prepared

from data_prep.hdr import HLG, PQ, hlg_to_light, light_to_pq, pq_to_light, to_sdr, tone_mapped


def test_pq_meets_its_standards_points_and_is_inverted() -> None:
    assert pq_to_light(np.array([0.0, 1.0])) == pytest.approx([0, 10_000])
    assert light_to_pq(np.array([100.0, 203.0, 1000.0])) == pytest.approx([0.5081, 0.5807, 0.7518], abs=1e-4)
    light = np.geomspace(0.01, 9999, 50)
    assert pq_to_light(light_to_pq(light)) == pytest.approx(light, rel=1e-6)


def test_hlg_meets_its_standards_points() -> None:
    grey = np.array([[0.0] * 3, [0.5] * 3, [0.75] * 3, [1.0] * 3])
    # BT.2408: 75 % HLG is reference white, 203 cd/m², on a display of 1,000
    assert hlg_to_light(grey)[:, 0] == pytest.approx([0, 50.7, 203, 1000], rel=0.01, abs=1e-3)


def test_tone_mapping_keeps_what_is_dark_rises_everywhere_and_ends_at_white() -> None:
    light = np.repeat(np.geomspace(0.1, 1000, 200)[:, None], 3, 1)
    mapped = tone_mapped(light)[:, 0]
    dark = light[:, 0] < 80
    assert mapped[dark] == pytest.approx(light[dark, 0], rel=1e-6)
    assert (np.diff(mapped) > 0).all() and mapped[-1] == pytest.approx(203, rel=1e-4)
    red = tone_mapped(np.array([[800.0, 80.0, 8.0]]))[0]
    assert red[0] / red[1] == pytest.approx(10) and red[1] / red[2] == pytest.approx(10)


@pytest.mark.parametrize("transfer", [PQ, HLG])
def test_grey_stays_grey_black_black_and_reference_white_bright(transfer: int) -> None:
    white = float(light_to_pq(np.array(203.0))) if transfer == PQ else 0.75
    signals = np.array([[0.0] * 3, [white * 0.6] * 3, [white] * 3, [1.0] * 3])
    made = to_sdr(signals, transfer)
    assert np.ptp(made, axis=1).max() < 2e-3
    assert made[0].max() < 1e-3 and 0.85 < made[2][0] < 0.95 and made[3][0] == pytest.approx(1, abs=1e-3)


def write_hdr(path: Path, signal: tuple[float, float, float], transfer: int) -> Path:
    """Write ten frames of one BT.2020 colour in 10 bits, HEVC, limited range."""
    red, green, blue = signal
    luma = 0.2627 * red + 0.6780 * green + 0.0593 * blue
    planes = [64 + 876 * luma, 512 + 896 * (blue - luma) / 1.8814, 512 + 896 * (red - luma) / 1.4746]
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libx265", rate=10, options={"crf": "6", "x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p10le"
        context = stream.codec_context
        context.time_base = Fraction(1, 10)
        context.color_range, context.colorspace, context.color_primaries, context.color_trc = 1, 9, 9, transfer
        for index in range(10):
            frame = av.VideoFrame(64, 48, "yuv420p10le")
            for plane, value in zip(frame.planes, planes, strict=True):
                rows = np.full((plane.height, plane.line_size // 2), round(value), dtype="<u2")
                plane.update(rows.tobytes())
            frame.pts, frame.time_base = index, Fraction(1, 10)
            frame.color_range, frame.colorspace = 1, 9
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("transfer", [PQ, HLG])
@pytest.mark.parametrize("signal", [(0.5, 0.5, 0.5), (0.6, 0.3, 0.2), (0.2, 0.5, 0.3)])
def test_a_file_comes_out_in_the_colours_that_the_formulas_give(
    tmp_path: Path, signal: tuple[float, float, float], transfer: int
) -> None:
    (sample,), _ = prepared(write_hdr(tmp_path / "a.mp4", signal, transfer))
    assert sample.record["video"]["orig"]["hdr"] == {PQ: "PQ", HLG: "HLG"}[transfer]
    assert sample.record["video"]["pix_fmt"] == "yuv420p" and sample.how == "encoded"
    expected = 255 * to_sdr(np.array(signal), transfer)
    made = frames_of(sample.media)[5][24, 32].astype(float)
    assert np.abs(made - expected).max() < 5, (made, expected)
