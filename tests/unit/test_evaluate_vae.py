"""Promises of stage=evaluate target=vae: every figure stands where its error is, and what is left out is counted."""

from __future__ import annotations

import csv
import logging
import sys
import types
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from data_tiny import fields, mp4, pixels, write, write_clips
from known_vae import FACTORY, I3D, MEDIA, Known, StandIn, decibels, figures, job, report_of, shown
from PIL import Image
from torch import nn

from soratrain.compared import Column, beside, heat, scale_top
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.run import prepare, run
from soratrain.stages import rebuild


@pytest.fixture
def known(monkeypatch) -> Known:
    net = Known()
    monkeypatch.setattr(rebuild, "load_vae", lambda *_: net)
    return net


def test_each_place_in_time_and_each_size_shows_its_own_error(tmp_path, known):
    shards = write_clips(tmp_path / "shards", [(32, 32, 9), (32, 32, 9), (16, 32, 13)])
    result = job(tmp_path, str(shards))()
    short, long = ([decibels(known.level(frame)) for frame in range(frames)] for frames in (9, 13))
    found = figures(tmp_path)
    assert found == pytest.approx(
        {
            "all frames": (2 * np.mean(short) + np.mean(long)) / 3,  # clips count alike
            "first frame": decibels(2),
            "4k+1": decibels(3),
            "4k+2": decibels(4),
            "4k+3": decibels(5),
            "4k": decibels(6),
            "32x32x9": np.mean(short),
            "32x16x13": np.mean(long),
        }
    )
    assert result["psnr"] == pytest.approx(found["all frames"])
    spread = report_of(tmp_path)["rows"][0]["psnr"]["spread"]
    assert spread == pytest.approx(np.std([np.mean(short)] * 2 + [np.mean(long)], ddof=1))
    with (tmp_path / "out" / "metrics.csv").open() as file:
        lines = {line["name"]: line for line in csv.DictReader(file)}
    assert {name: float(line["psnr"]) for name, line in lines.items()} == pytest.approx(found)
    assert lines["4k+1"]["frames"] == "7" and lines["32x32x9"]["clips"] == "2"
    with (tmp_path / "out" / "clips.csv").open() as file:
        assert [float(line["psnr 4k"]) for line in csv.DictReader(file)] == pytest.approx([decibels(6)] * 3)


def test_the_same_command_measures_the_same_and_a_long_clip_is_worked_on_in_pieces(tmp_path):
    weights.save(tmp_path / "vae", "vae", FACTORY(), FACTORY, {})
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 41)]))
    job(tmp_path, shards)()
    whole = report_of(tmp_path)
    job(tmp_path, shards, pixels_per_batch=1)()
    pieces = report_of(tmp_path)
    for a, b in zip(whole["rows"], pieces["rows"], strict=True):
        assert a["psnr"]["mean"] == pytest.approx(b["psnr"]["mean"], abs=0.01)
    assert pieces["cost"]["latent_channels"] == 4 and pieces["cost"]["values_ratio_of_long_clips"] == 192
    assert pieces["cost"]["values_ratio"] == pytest.approx(41 * 32 * 32 * 3 / (4 * 11 * 4 * 4))


def test_memory_does_not_grow_with_duration(tmp_path, known):
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 41)]))
    job(tmp_path, shards, pixels_per_batch=8 * 32 * 32)()
    assert known.most == 8


def test_clips_are_trimmed_and_cropped_by_a_rule_that_counts(tmp_path, known, monkeypatch):
    shapes = [(34, 50, 9), (32, 32, 7), (32, 32, 3), (8, 64, 9), (32, 32, 1)]
    shards = str(write_clips(tmp_path / "shards", shapes))
    job(tmp_path, shards)()
    found = report_of(tmp_path)
    assert found["clips"] == {
        "measured": 2,
        "left_out": {"fewer than 5 frames": 2, "a side under 11 pixels, SSIM's window": 1},
        "frames": 14,
        "frames_not_used": 2,
        "trimmed": 1,
        "cropped": 1,
        "pixels_cropped": pytest.approx(1 - (32 * 48 + 32 * 32) / (34 * 50 + 32 * 32)),
        "scaled": 0,
    }
    assert "1 + 4k" in found["rule"] and "multiples of 8" in found["rule"]
    assert {row["name"] for row in found["rows"] if row["kind"] == "bucket"} == {"48x32x9", "32x32x5"}
    job(tmp_path, shards, size="32x32", max_frames=5)()
    assert [row["name"] for row in report_of(tmp_path)["rows"]][-1] == "32x32x5"
    assert report_of(tmp_path)["clips"]["scaled"] == 2
    with pytest.raises(ConfigError, match="size=20x32.*multiple of the VAE's stride of 8x8 pixels; use 16x32"):
        job(tmp_path, shards, size="20x32")()


def test_images_are_measured_where_they_are_asked_for(tmp_path, known):
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 1), (32, 48, 1)]))
    job(tmp_path, shards, min_frames=1)()
    assert figures(tmp_path)["all frames"] == pytest.approx(decibels(2)) and "4k" not in figures(tmp_path)
    assert len(list((tmp_path / "out" / "clips").glob("*.png"))) == 2


def test_clips_of_which_none_is_long_enough_are_refused_with_the_reason(tmp_path, known):
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 7), (32, 32, 1)]))
    with pytest.raises(DataError, match=r"no clip can be measured \(2 × fewer than 9 frames\).*lower stage.job.min"):
        job(tmp_path, shards, min_frames=9)()


def test_a_damaged_clip_is_counted_and_another_is_taken(tmp_path, known):
    good = mp4(pixels(0, 32, 32, 9), 8)
    write(tmp_path / "shards", [(fields(32, 32, 9, "mp4"), media) for media in (good, good[: len(good) // 3], good)])
    job(tmp_path, str(tmp_path / "shards"))()
    assert report_of(tmp_path)["clips"]["left_out"] == {"cannot be decoded": 1}
    assert report_of(tmp_path)["clips"]["measured"] == 2


def test_what_is_no_number_is_said_and_not_averaged_away(tmp_path, known, capsys):
    known.broken = 3
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 9)] * 2))
    result = job(tmp_path, shards)()
    found = figures(tmp_path)
    assert [found[name] for name in ("all frames", "4k+3", "32x32x9")] == [None] * 3 and result["psnr"] is None
    assert found["4k+1"] == pytest.approx(decibels(3))
    assert [(item["frames"], item["first"]) for item in report_of(tmp_path)["not_finite"]] == [(1, 3)] * 2
    said = capsys.readouterr().out
    assert "NOT A NUMBER" in said and "the first is 3" in said and "NaN" in said


def test_weights_that_are_no_numbers_or_of_another_config_are_named(tmp_path):
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 9)]))
    net = FACTORY()
    with torch.no_grad():
        next(net.decoder.parameters()).fill_(torch.nan)
    weights.save(tmp_path / "vae", "vae", net, FACTORY, {})
    with pytest.raises(DataError, match=r"weights are NaN or infinite in decoder\.\S+; train"):
        job(tmp_path, shards)()
    weights.save(tmp_path / "vae", "vae", FACTORY(), partial(FACTORY, latent_channels=8), {})
    with pytest.raises(DataError, match=r"do not fit VAE.*of another shape.*decoder"):
        job(tmp_path, shards)()
    weights.save(tmp_path / "vae", "vae", FACTORY(), partial(FACTORY, decoder_blocks=[1, 2]), {})
    with pytest.raises(DataError, match=r"do not fit VAE: missing \['decoder"):
        job(tmp_path, shards)()


def test_a_net_that_is_no_autoencoder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda *_: (nn.Linear(1, 1), {}))
    with pytest.raises(ConfigError, match="holds a Linear; give a VAE's folder"):
        job(tmp_path, str(write_clips(tmp_path / "shards", [(32, 32, 9)])))()


def test_rfvd_compares_both_sides_and_says_when_clips_are_too_few(tmp_path, known):
    torch.jit.script(I3D()).save(str(tmp_path / "i3d.pt"))
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 9), (32, 32, 13), (32, 32, 5), (32, 32, 9)]))
    result = job(tmp_path, shards, fvd={"i3d": str(tmp_path / "i3d.pt"), "frames": 9})()
    found = report_of(tmp_path)["rfvd"]
    assert (found["clips"], found["features"]) == (3, 4) and "too few clips" in found["note"]
    # every clip is as much brighter as the mean level of its first 9 frames: the means differ, covariances do not
    expected = 3 * np.mean([known.level(frame) for frame in range(9)]) ** 2
    assert result["rfvd"] == pytest.approx(found["value"]) == pytest.approx(expected, rel=1e-3)
    job(tmp_path, shards, clips=1, fvd={"i3d": str(tmp_path / "i3d.pt"), "frames": 13})()
    assert report_of(tmp_path)["rfvd"]["value"] is None
    known.broken = 4
    job(tmp_path, shards, fvd={"i3d": str(tmp_path / "i3d.pt"), "frames": 9})()
    assert report_of(tmp_path)["rfvd"]["value"] is None


def test_lpips_is_measured_where_its_weights_are_given(tmp_path, known, monkeypatch):
    module = types.ModuleType("soratrain.models.lpips")
    read = []
    module.load_lpips = lambda *files: read.append(files) or StandIn()  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "soratrain.models.lpips", module)
    shards = str(write_clips(tmp_path / "shards", [(32, 32, 9)]))
    job(tmp_path, shards, lpips={"vgg": "a.pth", "lin": "b.pth"})()
    assert figures(tmp_path, "lpips")["4k+2"] == pytest.approx(4 / 127.5, rel=1e-4)
    assert read == [("a.pth", "b.pth")]
    with pytest.raises(ConfigError, match="lpips.vgg is given and lpips.lin is not"):
        job(tmp_path, shards, lpips={"vgg": "a.pth", "lin": None})


def test_what_is_off_is_said_in_one_line(tmp_path, known, caplog):
    caplog.set_level(logging.INFO, "soratrain")
    job(tmp_path, str(write_clips(tmp_path / "shards", [(32, 32, 9)])))()
    assert {record.message for record in caplog.records if "off" in record.message} == {
        "off, since their weights are not given: LPIPS (lpips.vgg=FILE lpips.lin=FILE), rFVD (fvd.i3d=FILE)"
    }


def test_the_worst_clip_and_the_best_are_drawn_with_both_sides_aligned(tmp_path, known):
    shards = str(write_clips(tmp_path / "shards", [(32, 48, 9), (32, 32, 13), (32, 32, 5)]))
    job(tmp_path, shards)()
    files = sorted(path.name for path in (tmp_path / "out" / "clips").iterdir())
    assert [name.split("-")[1] + name[-4:] for name in files] == ["worst.mp4", "worst.png", "best.mp4", "best.png"]
    with av.open(str(tmp_path / "out" / "clips" / files[2])) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert container.streams.video[0].average_rate == 8
    assert len(frames) == 5 and frames[0].shape == (28 + 256, 2 * 256 + 8, 3)
    for number, frame in enumerate(frames):
        left, right = (frame[60:, side : side + 240].mean() for side in (8, 272))
        assert right - left == pytest.approx(Known.level(number), abs=1.1)
    assert Image.open(tmp_path / "out" / "clips" / files[3]).size[0] >= 640


def test_the_heat_map_grows_lighter_with_the_error_and_its_scale_holds_it():
    colours = heat(np.linspace(0, 64, 65), 64).astype(int).sum(-1)
    assert (np.diff(colours) > 0).all() and heat(np.array(200.0), 64).tolist() == [252, 253, 191]
    assert scale_top([np.zeros((4, 4))]) == 8 and scale_top([np.full((4, 4), 33.0)]) == 64
    grey = np.full((8, 8, 3), 100, np.uint8)
    column = Column("", "", grey, grey + np.uint8(6))
    assert (column.error() == 6).all()
    (frame,) = beside([(grey, grey + np.uint8(6))])
    assert frame.shape == (28 + 256, 520, 3) and (frame[28:, :256] == 100).all() and (frame[28:, 264:] == 106).all()


def test_the_table_fits_the_terminal_and_no_figure_is_cut(tmp_path, known, capsys):
    job(tmp_path, str(write_clips(tmp_path / "shards", [(32, 32, 9), (16, 32, 13)])))()
    report = report_of(tmp_path)
    for width, holds, lacks in ((100, "±", "…"), (56, "clips", "±"), (36, "PSNR dB", "clips")):
        table = [line for line in shown(report, width, capsys) if line and line[0] in "┏┃┡│├└"]
        assert max(map(len, table)) <= width
        assert any(holds in line for line in table) and not any(lacks in line for line in table[:4])
        assert any("32x32x9" in line for line in table) and "…" not in "".join(table)


@pytest.mark.media
def test_a_folder_of_real_videos_is_measured_as_it_is(tmp_path, known, monkeypatch, capsys):
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("lavila.mp4", "rot_90.mov", "corrupted.mp4", "test.avi"):
        (folder / name).symlink_to(MEDIA / name)
    (folder / "notes.txt").write_text("no video")
    (folder / "broken.mp4").write_bytes(b"nothing of the kind")
    (tmp_path / "vae").mkdir()
    for ending in ("safetensors", "yaml"):
        (tmp_path / "vae" / f"vae.{ending}").touch()
    words = ["stage=evaluate", "target=vae", "machine=laptop", f"inputs.shards={folder}", f"out={tmp_path / 'out'}"]
    words += [f"inputs.vae={tmp_path / 'vae'}", "stage.job.size=128x128", "stage.job.max_frames=11"]
    config, overrides = prepare([*words, "stage.job.shown=1"])
    run(config, overrides)
    found = report_of(tmp_path)
    assert found["clips"]["measured"] == found["clips"]["scaled"] == 3
    assert found["clips"]["left_out"].pop("fewer than 5 frames") == 1  # rot_90 has three
    assert [reason[:14] for reason in found["clips"]["left_out"]] == ["cannot be used"]
    named = {Path(each["clip"]).name: each["reason"] for each in found["left_out"]}
    assert set(named) == {"rot_90.mov", "broken.mp4"} and named["broken.mp4"].startswith("cannot be used")
    assert "broken.mp4)" in capsys.readouterr().out
    assert [row["name"] for row in found["rows"]][-1] == "128x128x9"
    assert figures(tmp_path)["first frame"] == pytest.approx(decibels(2), abs=0.5)  # white may not grow lighter
    (folder / "later.mp4").symlink_to(MEDIA / "cog4.mp4")
    with pytest.raises(ConfigError, match="inputs.shards=.* was made anew"):
        run(config, overrides)
