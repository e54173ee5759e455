"""Promises about videos with transparency: white is behind them as behind images, and none of it is lost in silence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.codec.codec import UnknownCodecError
from prep_clips import close, frames_of, moving, prepared

FORMATS: dict[str, dict[str, Any]] = {
    "vp9.webm": {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "options": {"crf": "4", "b": "0", "auto-alt-ref": "0"}},
    "vp8.webm": {"codec": "libvpx", "pix_fmt": "yuva420p", "options": {"crf": "4", "b": "4M", "auto-alt-ref": "0"}},
    "prores.mov": {"codec": "prores_ks", "pix_fmt": "yuva444p10le", "options": {"profile": "4444"}},
    "qtrle.mov": {"codec": "qtrle", "pix_fmt": "argb"},
    "png.mov": {"codec": "png", "pix_fmt": "rgba"},
    "ffv1.mkv": {"codec": "ffv1", "pix_fmt": "bgra"},
    "raw.avi": {"codec": "rawvideo", "pix_fmt": "bgra"},
    "a.apng": {"codec": "apng", "pix_fmt": "rgba"},
}


def glass(count: int, level: int = 0) -> list[np.ndarray]:
    """Return RGBA frames that let through all on the left, half at the top right; `level` is the left's alpha."""
    frames = []
    for pixels in moving(count):
        alpha = np.full((*pixels.shape[:2], 1), 255, np.uint8)
        alpha[:24, 32:], alpha[:, :32] = 128, level
        frames.append(np.concatenate([pixels, alpha], -1))
    return frames


def on_white(frame: np.ndarray) -> np.ndarray:
    """Return RGBA over white by the definition of it."""
    alpha = frame[..., 3:] / 255
    return np.rint(frame[..., :3] * alpha + 255 * (1 - alpha)).astype(np.uint8)


def write(
    path: Path, frames: Sequence[np.ndarray], *, codec: str, pix_fmt: str, options: dict[str, str] | None = None
) -> Path:
    """Write RGBA frames as a video."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream(codec, rate=10, options=options or {})
        stream.width, stream.height, stream.pix_fmt = frames[0].shape[1], frames[0].shape[0], pix_fmt
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format=pix_fmt)
            frame.pts = index
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("name", FORMATS)
def test_what_is_transparent_is_laid_on_white(tmp_path: Path, name: str) -> None:
    frames = glass(8)
    (sample,), report = prepared(write(tmp_path / name, frames, **FORMATS[name]), detect=False)
    made = frames_of(sample.media)
    assert len(made) == 8 and report.failures == []
    assert all((picture[:, :28] >= 252).all() for picture in made)
    assert all(close(picture, on_white(frame), mean=4) for picture, frame in zip(made, frames, strict=True))
    assert sample.record["video"]["orig"]["alpha"] == "laid on white"


def test_a_gif_is_laid_on_white(tmp_path: Path) -> None:
    from PIL import Image

    pictures = [Image.fromarray(frame) for frame in glass(8)]
    pictures[0].save(tmp_path / "a.gif", save_all=True, append_images=pictures[1:], duration=100, disposal=2)
    (sample,), _ = prepared(tmp_path / "a.gif", detect=False)
    assert all((picture[:, :28] >= 252).all() for picture in frames_of(sample.media))
    assert sample.record["video"]["orig"]["alpha"] == "laid on white"


@pytest.mark.parametrize("name", ["vp9.webm", "qtrle.mov"])
def test_a_layer_that_hides_nothing_changes_nothing(tmp_path: Path, name: str) -> None:
    frames = [np.concatenate([frame, np.full((48, 64, 1), 255, np.uint8)], -1) for frame in moving(8)]
    path = write(tmp_path / name, frames, **FORMATS[name])
    (sample,), report = prepared(path, detect=False)
    assert sample.record["video"]["orig"]["alpha"] == "" and report.failures == []
    assert all(close(a, b[..., :3], mean=4) for a, b in zip(frames_of(sample.media), frames, strict=True))


def test_a_layer_that_nobody_filled_in_is_ignored_and_reported(tmp_path: Path) -> None:
    frames = [np.concatenate([frame, np.zeros((48, 64, 1), np.uint8)], -1) for frame in moving(8)]
    (sample,), report = prepared(write(tmp_path / "a.avi", frames, **FORMATS["raw.avi"]), detect=False)
    (failure,) = report.failures
    assert "hides all of every frame" in failure.reason and failure.used
    assert all(close(a, b[..., :3], mean=4) for a, b in zip(frames_of(sample.media), frames, strict=True))


def test_frames_that_are_clear_all_over_are_white_where_others_are_not(tmp_path: Path) -> None:
    clear = [np.concatenate([frame, np.zeros((48, 64, 1), np.uint8)], -1) for frame in moving(4)]
    path = write(tmp_path / "a.mov", [*clear, *glass(4)], **FORMATS["qtrle.mov"])
    (sample,), report = prepared(path, detect=False)
    assert report.failures == [] and all((frame >= 252).all() for frame in frames_of(sample.media)[:4])


def test_without_libvpx_the_loss_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str, mode: str) -> None:
        raise UnknownCodecError(name)

    frames = glass(8)
    path = write(tmp_path / "a.webm", frames, **FORMATS["vp9.webm"])
    monkeypatch.setattr(av.CodecContext, "create", missing)
    (sample,), report = prepared(path, detect=False)
    (failure,) = report.failures
    assert "libvpx" in failure.reason and failure.used == "the picture without it"
    assert sample.record["video"]["orig"]["alpha"] == "lost"
    assert all(close(a, b[..., :3], mean=4) for a, b in zip(frames_of(sample.media), frames, strict=True))


def test_what_flickers_behind_a_transparent_ground_is_no_cut(tmp_path: Path) -> None:
    frames = glass(20)
    for index, frame in enumerate(frames):
        frame[:, :32, :3] = 255 if index >= 10 else 0
    samples, _ = prepared(write(tmp_path / "a.mov", frames, **FORMATS["qtrle.mov"]))
    assert len(samples) == 1
