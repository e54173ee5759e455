"""Promises about bad files and odd names: each has its own reason, none stops a run."""

from __future__ import annotations

import json
import struct
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from prep_clips import PREP, close, frames_of, moving, picture, prepared, set_turn, write, write_sound

from data_prep.encode import Encoding
from data_prep.files import FileUnit
from data_prep.ingest import find
from data_prep.pack import Report
from data_prep.shots import Cutting
from data_prep.sidecars import from_name
from soratrain.errors import DataError


def reason(path: Path) -> str:
    """Return why nothing of a file was used."""
    samples, report = prepared(path)
    (failure,) = report.failures
    assert samples == [] and failure.used == "" and failure.uri == path.name
    return failure.reason


def test_an_empty_file_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").touch()
    assert "empty" in reason(tmp_path / "a.mp4")


def test_random_bytes_and_text_are_no_video(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(np.random.default_rng(0).bytes(5000))
    (tmp_path / "b.mp4").write_text("not a video at all\n" * 50)
    assert "not a video" in reason(tmp_path / "a.mp4")
    assert "not a video" in reason(tmp_path / "b.mp4")


def test_a_missing_index_is_named(tmp_path: Path) -> None:
    data = write(tmp_path / "a.mp4", moving(20)).read_bytes()
    (tmp_path / "a.mp4").write_bytes(data[: data.index(b"moov") - 4])
    assert "moov" in reason(tmp_path / "a.mp4")


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    assert reason(write_sound(tmp_path / "a.mp4")) == "has no video stream, only audio"


def test_a_file_that_went_away_is_reported(tmp_path: Path) -> None:
    assert reason(tmp_path / "a.mp4") == "there is no such file"


def test_a_file_that_is_cut_off_gives_its_leading_part_and_the_reason(tmp_path: Path) -> None:
    frames = moving(30)
    path = write(tmp_path / "a.mp4", frames, options={"crf": "0"}, container={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (sample,), report = prepared(path)
    result = frames_of(sample.media)
    assert 15 < len(result) < 25 and all(close(a, b) for a, b in zip(result, frames[: len(result)], strict=True))
    assert [(item.step, bool(item.used)) for item in report.failures] == [("probe", True)]
    assert sample.record["video"]["orig"]["damage"] == report.failures[0].reason


@pytest.mark.parametrize("name", ["a.mkv", "a.webm", "a.gif"])
def test_any_file_that_says_more_than_there_is_is_reported_and_its_last_frame_is_whole(
    tmp_path: Path, name: str
) -> None:
    frames = [picture(seed=step) for step in range(20)]
    codecs = {"a.webm": ("libvpx", "yuv420p"), "a.gif": ("gif", "rgb8")}
    codec, pix_fmt = codecs.get(name, ("libx264", "yuv420p"))
    path = write(tmp_path / name, frames, codec=codec, pix_fmt=pix_fmt)
    (whole,), report = prepared(path, detect=False)
    assert report.failures == []
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (sample,), report = prepared(path, detect=False)
    (failure,) = report.failures
    result = frames_of(sample.media)
    assert failure.reason == f"the file is cut off: frames after {len(result)} are missing" and len(result) > 5
    assert close(result[-1], frames_of(whole.media)[len(result) - 1])


def test_damage_in_the_middle_ends_the_clip_before_it(tmp_path: Path) -> None:
    frames = moving(30)
    path = write(tmp_path / "a.mp4", frames, options={"crf": "0"})
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 400] = b"\xaa" * 400
    path.write_bytes(data)
    (sample,), report = prepared(path)
    result = frames_of(sample.media)
    assert 5 < len(result) < 20 and all(close(a, b) for a, b in zip(result, frames[: len(result)], strict=True))
    assert "damaged after frame" in report.failures[0].reason


def test_too_little_before_the_damage_is_not_used(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(30), options={"crf": "0"}, container={"movflags": "+faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    samples, report = prepared(path, min_seconds=2.5)
    assert samples == [] and [item.used for item in report.failures] == [""]


def test_a_picture_that_cannot_be_converted_counts_every_clip_of_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mov", [frame[:, :1] for frame in moving(30)], codec="png", pix_fmt="rgb24")
    samples, report = prepared(path, max_seconds=1.0)
    (failure,) = report.failures
    assert samples == [] and "only 1x48 pixels" in failure.reason and failure.step == "transcode"
    tally = report.tallies["transcode"]
    assert (tally.entered, tally.left, tally.dropped.total()) == (3, 0, 3)


def test_a_header_with_impossible_pixels_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(5), aspect=Fraction(4, 3))
    data = bytearray(path.read_bytes())
    struct.pack_into(">II", data, data.index(b"pasp") + 4, 1, 600)
    path.write_bytes(data)
    assert reason(path) == "the picture is 64x28800 pixels with square pixels (its own are 1/600); " + (
        "H.264 takes 16384 a side at most"
    )


def test_captions_of_a_file_are_not_put_on_its_parts(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", moving(30))
    (tmp_path / "a.txt").write_text("a cat wakes up, eats and sleeps")
    (source,), _ = find(str(tmp_path), Report())
    for seconds, count, texts in ((20.0, 1, [["a cat wakes up, eats and sleeps"]]), (1.0, 3, [[], [], []])):
        report = Report()
        unit = FileUnit((source,), Cutting(max_seconds=seconds), Encoding(), "", PREP)
        samples = list(unit.samples(report))
        assert [[item["text"] for item in sample.record["captions"]] for sample in samples] == texts
        assert [item.step for item in report.failures] == ["shots"] * (count > 1)


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    import av

    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        sound = file.add_stream("aac", rate=16000)
        cover = file.add_stream("png", rate=1)
        cover.width, cover.height, cover.pix_fmt = 64, 48, "rgb24"
        cover.disposition = av.stream.Disposition.attached_pic
        silence = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        silence.rate, silence.pts = 16000, 0
        file.mux(cover.encode(av.VideoFrame.from_ndarray(picture(), format="rgb24")))
        file.mux(cover.encode(None))
        file.mux(sound.encode(silence))
        file.mux(sound.encode(None))
    assert reason(path) == "has no video stream, only audio and cover art"


NAMES = [
    "with space.mp4",
    'it\'s "quoted".mp4',
    "猫 café 🐈.mp4",
    "-dash.mp4",
    "{1..2}.mp4",
    "%d.mp4",
    "a=b,c.mp4",
    "UP.MP4",
    "dots...in.a.row.mp4",
    "é" * 123 + ".mp4",  # 250 bytes
]


def test_no_name_means_anything(tmp_path: Path) -> None:
    for index, name in enumerate(NAMES):
        write(tmp_path / "x.mp4", moving(3, seed=index)).rename(tmp_path / name)
    (tmp_path / "x.png").write_bytes(b"")
    sources, _ = find(str(tmp_path), Report())
    assert [source.uri for source in sources] == sorted([*NAMES, "x.png"])
    for source in sources:
        if source.uri == "x.png":
            continue
        assert len(prepared(source.path)[0]) == 1, source.uri


def test_a_folder_is_searched_below_without_hidden_files_and_loops(tmp_path: Path) -> None:
    for name in ("b/clip.mp4", "a/clip.mp4", ".hidden/c.mp4", "a/.DS_Store", "a/._clip.mp4", "a/notes.pdf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a/loop").symlink_to(tmp_path)
    report = Report()
    sources, _ = find(str(tmp_path), report)
    assert [source.uri for source in sources] == ["a/clip.mp4", "b/clip.mp4"]
    assert report.tallies["ingest"].how == {"left out, not video or image": 1}


def test_a_list_names_files_of_any_name_beside_it(tmp_path: Path) -> None:
    (tmp_path / "clip.dat").write_bytes(b"x")
    (tmp_path / "list.txt").write_text(f"clip.dat\n\n  {tmp_path / 'clip.dat'}  \nmissing.mp4\n", encoding="utf-8")
    sources, _ = find(str(tmp_path / "list.txt"), Report())
    assert [source.uri for source in sources] == sorted([str(tmp_path / "clip.dat"), "clip.dat", "missing.mp4"])
    assert reason(sources[-1].path) == "there is no such file"


def test_a_glob_matches_files(tmp_path: Path) -> None:
    for name in ("a1.mp4", "a2.mkv", "b1.mp4", "a3.txt"):
        (tmp_path / name).write_bytes(b"x")
    sources, _ = find(str(tmp_path / "a*"), Report())
    assert [source.path.name for source in sources] == ["a1.mp4", "a2.mkv"]


@pytest.mark.parametrize("where", ["nothing", "nothing/*.mp4", "empty", "list.txt", "texts"])
def test_input_without_anything_in_it_is_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.pdf").touch()
    (tmp_path / "list.txt").write_text("\n")
    with pytest.raises(DataError, match=f"input=.*{where.split('/')[0]}") as caught:
        find(str(tmp_path / where), Report())
    assert "\n" not in str(caught.value)


def test_the_listing_changes_with_names_sizes_and_captions(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"x")
    listings = [find(str(tmp_path), Report())[1]]
    for name, content in (("a.mp4", b"xy"), ("a.txt", b"a cat"), ("a.txt", b"a dog"), ("b.mp4", b"x")):
        (tmp_path / name).write_bytes(content)
        listings.append(find(str(tmp_path), Report())[1])
    assert len(set(listings)) == 5 and find(str(tmp_path), Report())[1] == listings[-1]


def test_captions_beside_a_file_come_in_with_it(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4", "c.mp4"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "a.txt").write_text("a cat,\n  asleep\n", encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({"captions": ["one", "三只猫"]}), encoding="utf-8")
    (tmp_path / "c.json").write_text("{broken", encoding="utf-8")
    report = Report()
    sources, _ = find(str(tmp_path), report)
    assert [[caption.text for caption in source.captions] for source in sources] == [
        ["a cat, asleep"],
        ["one", "三只猫"],
        [],
    ]
    assert {caption.type for source in sources for caption in source.captions} == {"gt"}
    assert [(item.uri, bool(item.used)) for item in report.failures] == [("c.mp4", True)]


def test_images_are_copied_and_transparent_ones_are_laid_on_white(tmp_path: Path) -> None:
    from data_prep.encode import encode_png

    (tmp_path / "a.png").write_bytes(encode_png(picture()))
    (sample,), _ = prepared(tmp_path / "a.png")
    assert sample.kind == "image" and sample.media == (tmp_path / "a.png").read_bytes()
    clear = np.concatenate([picture(), np.zeros((48, 64, 1), np.uint8)], -1)
    clear[:, 32:, 3] = 255
    write_rgba(tmp_path / "b.png", clear)
    (sample,), _ = prepared(tmp_path / "b.png")
    result = frames_of(sample.media)[0]
    assert (result[:, :32] == 255).all() and (result[:, 32:] == picture()[:, 32:]).all()


def write_rgba(path: Path, pixels: np.ndarray) -> None:
    import av

    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 64, 48, "rgba", 1
    frame = av.VideoFrame.from_ndarray(pixels, format="rgba")
    path.write_bytes(b"".join(bytes(packet) for packet in [*context.encode(frame), *context.encode(None)]))


def test_a_quarter_turn_of_a_damaged_file_is_still_baked_in(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", moving(30), options={"crf": "0"}, container={"movflags": "+faststart"})
    set_turn(path, (0, 1, -1, 0))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    (sample,), _ = prepared(path)
    assert frames_of(sample.media)[0].shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("train_running.mp4", "train running"),
        ("a stylish-woman.walks.mov", "stylish woman walks"),
        ("三只猫.mp4", "三只猫"),
        ("IMG_20210304.mp4", None),
        ("a3f09c11.mp4", None),
        ("0001.mp4", None),
    ],
)
def test_a_file_without_a_caption_is_captioned_by_the_words_of_its_name(name, caption):
    found = from_name(Path(name))
    assert [item.text for item in found] == ([caption] if caption else [])
    assert all(item.type == "gt" and item.model == "filename" for item in found)
