"""Promises of task=score: what trained models say is in the manifest, as computed by hand, and nothing else changes."""

from __future__ import annotations

import hashlib
import json
import zlib
from pathlib import Path
from shutil import copytree
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from prep_clips import frames_of, moving, write
from rating_models import write_clip, write_detector, write_head
from transformers import CLIPImageProcessor, CLIPModel, CLIPVisionModelWithProjection

from data_prep import output
from data_prep.__main__ import main
from data_prep.clip_score import Aesthetic, load_clip, read_head
from data_prep.encode import encode_png
from data_prep.pictures import places
from data_prep.text_area import SIDE, TextArea
from soratrain.data.manifest import write_manifest
from soratrain.data.reading import read_table
from soratrain.data.shards import ShardReader

Rows = dict[str, dict[str, Any]]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_clip(folder / "clip")
    write_clip(folder / "vision", vision=True, seed=1)
    write_head(folder / "linear.safetensors")
    write_head(folder / "other.pth", seed=1)
    write_head(folder / "five.pth", five=True)
    write_detector(folder / "text.onnx")
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished folder of four shards: two clips, and three stills of noise; these alone have a blue box."""
    folder = tmp_path_factory.mktemp("rated")
    videos = folder / "videos"
    videos.mkdir()
    red_green = np.array((1, 1, 0), np.uint8)
    write(videos / "a.mp4", [frame * red_green for frame in moving(20, seed=1)])
    write(videos / "b.mp4", [frame * red_green for frame in moving(7, 64, 48, seed=2)])
    noise = np.random.default_rng(0)
    for name in ("c", "d", "e"):
        pixels = noise.integers(0, 256, (760, 760, 3), np.uint8) * red_green
        pixels[100:200, 150:400, 2] = 255
        (videos / f"{name}.png").write_bytes(encode_png(pixels))
    assert main([f"input={videos}", f"output={folder / 'built'}", "shards.mb=1", "shots.detect=false"]) == 0
    assert len(list((folder / "built").glob("*.tar"))) == 4
    return folder / "built"


@pytest.fixture
def built(finished: Path, tmp_path: Path) -> Path:
    return copytree(finished, tmp_path / "built")


def by_aesthetic(models: Path, clip: str = "clip", head: str = "linear.safetensors") -> list[str]:
    return [f"score.clip={models / clip}", f"score.aesthetic={models / head}", "score.device=cpu"]


def by_text(models: Path) -> list[str]:
    return [f"score.text={models / 'text.onnx'}"]


def score(folder: Path, *argv: str) -> int:
    return main(["task=score", f"input={folder}", *argv])


def rows_of(folder: Path) -> Rows:
    """Return the manifest by the names of the files that samples come from, scores read."""
    reader = ShardReader(folder)
    rows = {}
    for row in read_table(folder).to_pylist():
        record = json.loads(reader.read(row["shard"], row["json_offset"], row["json_length"]))
        rows[record["source"]["uri"][0]] = row | {"scores": json.loads(row["scores"])}
    return rows


def values(folder: Path, name: str) -> dict[str, float]:
    return {uri: row["scores"][name] for uri, row in rows_of(folder).items() if name in row["scores"]}


def tars(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.tar")}


def dataset(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "dataset.json").read_text()))


def layers(state: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    for name in sorted(name for name in state if name.endswith("weight")):
        x = x @ state[name].T + state[name.replace("weight", "bias")]
    return x


@pytest.mark.parametrize(
    ("clip", "head"), [("clip", "linear.safetensors"), ("vision", "five.pth"), ("clip", "five.pth")]
)
def test_aesthetic_is_the_head_of_the_embedding_of_length_one(models: Path, built: Path, clip: str, head: str) -> None:
    assert score(built, *by_aesthetic(models, clip, head), "score.batch=4") == 0
    found = values(built, "aesthetic")
    network = {"clip": CLIPModel, "vision": CLIPVisionModelWithProjection}[clip].from_pretrained(models / clip).eval()
    processor = CLIPImageProcessor.from_pretrained(models / clip)
    for uri, row in rows_of(built).items():
        media = ShardReader(built).read(row["shard"], row["media_offset"], row["media_length"])
        frames = frames_of(media)
        wanted = {20: (3, 10, 16), 7: (1, 3, 5), 1: (0,)}[len(frames)]
        pixels = processor(images=[frames[place] for place in wanted], return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            made = network.get_image_features(pixels) if clip == "clip" else network(pixels)
            embedded = made.pooler_output if clip == "clip" else made.image_embeds
            expected = layers(read_head(models / head), embedded / embedded.norm(dim=-1, keepdim=True))
        assert found[uri] == pytest.approx(expected.mean().item(), abs=2e-4)
    assert len(set(found.values())) == 5


def test_text_area_is_the_share_of_boxes_grown_around_what_is_probable(models: Path, tmp_path: Path) -> None:
    detector = TextArea(models / "text.onnx")
    pixels = np.zeros((SIDE, SIDE, 3), np.uint8)
    assert detector.rate([detector.prepare(pixels)]) == [0.0]
    pixels[100:150, 200:500, 2] = 255
    grown = 2 * 49 * 299 / (49 + 299)
    expected = (50 + grown) * (300 + grown) / SIDE**2
    assert detector.rate([detector.prepare(pixels)] * 2) == pytest.approx([expected] * 2, rel=0.01)
    pixels[400:500, 200:500, 2] = 110  # seen, not believed
    pixels[600:602, 200:500, 2] = 255  # too thin
    assert detector.rate([detector.prepare(pixels)]) == pytest.approx([expected], rel=0.01)
    wide = cv2.resize(pixels, (2 * SIDE, SIDE // 2), interpolation=cv2.INTER_AREA)
    assert detector.rate([detector.prepare(wide)]) == pytest.approx([expected], rel=0.03)
    unsure = TextArea(write_detector(tmp_path / "unsure.onnx", blue=0.45))
    assert unsure.rate([unsure.prepare(pixels)]) == [0.0]


def test_frames_are_the_middles_of_equal_parts() -> None:
    assert places(20, 3) == [3, 10, 16]
    assert places(20, 1) == [10]
    assert places(2, 5) == [0, 1]
    assert places(1, 3) == [0]


def test_shards_stay_other_scores_stay_and_the_folder_validates(models: Path, built: Path) -> None:
    shards, before = tars(built), rows_of(built)
    assert score(built, *by_aesthetic(models), *by_text(models)) == 0
    assert tars(built) == shards
    for uri, row in rows_of(built).items():
        own = {name: row["scores"].pop(name) for name in ("aesthetic", "text_area")}
        assert row == before[uri] and (own["text_area"] > 0.1) == (uri in "cde")
    assert not (built / ".scoring").exists() and not (built / "unscored.jsonl").exists()
    assert main(["task=validate", f"input={built}", "validate.decode=all", "workers=1"]) == 0
    page = (built / "report.html").read_text()
    assert "aesthetic" in page and "text_area" in page and "linear.safetensors" in page


def test_the_same_weights_are_done_and_others_replace(
    models: Path, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert score(built, *by_aesthetic(models)) == 0
    first, told = values(built, "aesthetic"), dataset(built)["rated"]
    assert told["aesthetic"]["frames"] == 3 and told["aesthetic"]["from"]["clip"] == "clip"
    copytree(models / "clip", built.parent / "copy")
    (built.parent / "h.safetensors").write_bytes((models / "linear.safetensors").read_bytes())
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.clip_score.load_clip", lambda folder: pytest.fail("CLIP was loaded"))
        assert score(built, *by_aesthetic(built.parent, "copy", "h.safetensors")) == 0
        assert "has aesthetic from these weights" in capsys.readouterr().out
        assert score(built, *by_aesthetic(models), *by_text(models)) == 0  # only what is not there
    assert values(built, "aesthetic") == first and len(values(built, "text_area")) == 5
    assert score(built, *by_aesthetic(models, head="other.pth")) == 0
    assert all(first[uri] != value for uri, value in values(built, "aesthetic").items())
    assert dataset(built)["rated"]["aesthetic"] != told["aesthetic"] and len(values(built, "text_area")) == 5
    assert score(built, *by_aesthetic(models), "score.frames=1") == 0
    assert values(built, "aesthetic")["a"] != first["a"] and values(built, "aesthetic")["c"] == first["c"]
    assert score(built, *by_aesthetic(models), "score.frames=1", "fresh=true") == 0
    assert "5 of 5 samples scored" in capsys.readouterr().out


def test_select_and_repack_see_scores_and_know_that_they_are_new(
    models: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = ["task=select", f"input={built}", f"output={tmp_path / 'out'}", "select.max_static=null"]
    assert main(chosen) == 0 and main(chosen) == 0
    assert main([*chosen, "select.max_text_area=0.1", "fresh=true"]) == 2
    assert "has no text_area, which task=score gives" in capsys.readouterr().err
    assert score(built, *by_aesthetic(models), *by_text(models)) == 0
    assert main(chosen) == 2
    assert "it was made again, or scored" in capsys.readouterr().err
    assert main([*chosen, "select.max_text_area=0.1", "fresh=true"]) == 0
    assert set(values(tmp_path / "out", "text_area")) == {"a", "b"}
    found = values(built, "aesthetic")
    best = max(found, key=lambda uri: found[uri])
    assert main([*chosen, f"select.min_aesthetic={found[best]}", "fresh=true"]) == 0
    assert values(tmp_path / "out", "aesthetic") == {best: found[best]}
    assert main(["task=repack", f"input={built}", f"output={tmp_path / 'packed'}"]) == 0
    assert values(tmp_path / "packed", "aesthetic") == found
    for folder in ("out", "packed"):
        assert dataset(tmp_path / folder)["rated"] == dataset(built)["rated"]
        assert main(["task=validate", f"input={tmp_path / folder}", "workers=1"]) == 0
    capsys.readouterr()
    assert score(tmp_path / "packed", *by_aesthetic(models)) == 0
    assert "has aesthetic from these weights" in capsys.readouterr().out


def test_an_interruption_costs_a_shard_at_most_and_changes_nothing_before_the_end(
    models: Path, built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = copytree(built, tmp_path / "whole")
    assert score(whole, *by_aesthetic(models)) == 0
    before = {path: path.read_bytes() for path in (*built.glob("manifest/*"), built / "dataset.json")}
    rate, seen = Aesthetic.rate, []

    def interrupted(self: Aesthetic, prepared: Any) -> list[float]:
        seen.append(len(prepared))
        if len(seen) == 2:
            raise KeyboardInterrupt
        return rate(self, prepared)

    monkeypatch.setattr(Aesthetic, "rate", interrupted)
    assert score(built, *by_aesthetic(models)) == 130
    assert all(path.read_bytes() == content for path, content in before.items())
    assert score(built, *by_text(models)) == 0  # another model may come in between
    write_json = output.write_json

    def killed(path: Path, value: Any) -> None:
        if path.name == "dataset.json":
            raise KeyboardInterrupt
        write_json(path, value)

    with monkeypatch.context() as patch:
        patch.setattr(output, "write_json", killed)
        assert score(built, *by_aesthetic(models)) == 130  # between the manifest and dataset.json
    assert "continuing, 1 of 4 shards were done" in capsys.readouterr().out
    assert main(["task=validate", f"input={built}", "workers=1"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr("data_prep.rated.write_report", lambda folder: killed(folder / "dataset.json", None))
        assert score(built, *by_aesthetic(models)) == 130  # and between that and the report
    assert "aesthetic" not in (built / "report.html").read_text()
    total = len(seen)
    assert score(built, *by_aesthetic(models)) == 0 and len(seen) == total == 5  # the second shard twice
    assert score(whole, *by_text(models)) == 0
    assert rows_of(built) == rows_of(whole) and dataset(built) == dataset(whole)
    assert not (built / ".scoring").exists() and "aesthetic" in (built / "report.html").read_text()


def test_what_a_model_makes_no_number_of_has_no_score(
    models: Path, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = iter([float("nan")])
    rate = Aesthetic.rate
    monkeypatch.setattr(Aesthetic, "rate", lambda self, items: [next(numbers, one) for one in rate(self, items)])
    assert score(built, *by_aesthetic(models)) == 0
    assert "its aesthetic is nan" in capsys.readouterr().out and len(values(built, "aesthetic")) == 4
    monkeypatch.setattr(Aesthetic, "rate", lambda self, items: [float("inf")] * len(items))
    assert score(built, *by_aesthetic(models), "fresh=true") == 2
    assert "none of 5 samples has a score aesthetic: its aesthetic is inf" in capsys.readouterr().err
    assert not (built / ".scoring").exists() and len(values(built, "aesthetic")) == 4


def test_a_clip_that_cannot_be_decoded_is_told_and_the_rest_goes_on(
    models: Path, built: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = read_table(built).to_pylist()
    broken = [row for row in rows if row["kind"] == "image"][:2]
    for row in broken:
        with open(built / row["shard"], "r+b") as file:
            file.seek(row["media_offset"])
            file.write(bytes(row["media_length"]))
    broken[0]["crc32"] = zlib.crc32(bytes(broken[0]["media_length"]))
    write_manifest(built, rows)
    assert score(built, *by_aesthetic(models), *by_text(models)) == 0
    assert "3 of 5 samples scored" in capsys.readouterr().out
    told = {row["key"]: row["reason"] for row in map(json.loads, (built / "unscored.jsonl").read_text().splitlines())}
    assert "cannot be decoded" in told[broken[0]["key"]] and "CRC-32" in told[broken[1]["key"]]
    assert len(values(built, "aesthetic")) == len(values(built, "text_area")) == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "name score.clip and score.aesthetic, or score.text"),
        (["score.clip={m}/clip"], "score.aesthetic is missing"),
        (["score.text={m}/text.onnx", "output=elsewhere"], "leave it out"),
        (["score.text={m}/none.onnx"], "none.onnx cannot be read: No such file"),
        (["score.text={m}/other.pth"], "is no ONNX network that OpenCV can run"),
        (["score.text={t}/mean.onnx"], "it makes [1, 1, 1, 1], not [1, 1, 736, 736]"),
        (["score.clip={m}/clip", "score.aesthetic={t}/wide.pth"], "8 wide, as one linear layer (weight, bias)"),
        (["score.clip={m}/clip", "score.aesthetic={t}/wide.pth"], "weight (1, 9), not (1, 8)"),
        (["score.clip={m}/clip", "score.aesthetic={m}/text.onnx"], "cannot be read as a state dict"),
        (["score.clip={t}", "score.aesthetic={m}/five.pth"], "is no folder that holds *.safetensors"),
        (["score.clip={t}/bert", "score.aesthetic={m}/five.pth"], "holds a bert; it takes a CLIPModel"),
        (["score.clip={t}/lame", "score.aesthetic={m}/five.pth"], "visual_projection.weight"),
        (
            ["score.clip={m}/clip", "score.aesthetic={m}/five.pth", "score.device=cuda:99"],
            "CUDA devices here; use auto",
        ),
        (["score.clip={m}/clip", "score.aesthetic={m}/five.pth", "score.device=tpu"], "score.device=tpu is not there"),
        (["score.text={m}/text.onnx", "score.frames=0"], "score.frames=0 must lie between 1"),
    ],
)
def test_wrong_weights_are_one_line(
    models: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], argv: list[str], said: str
) -> None:
    write_detector(tmp_path / "mean.onnx", whole=False)
    write_head(tmp_path / "wide.pth", width=9)
    copytree(models / "clip", tmp_path / "bert")
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    clip, processor = load_clip(models / "vision")
    clip.vision_model.save_pretrained(tmp_path / "lame")  # without its projection
    processor.save_pretrained(tmp_path / "lame")
    before = (built / "dataset.json").read_bytes()
    assert score(built, *(item.format(m=models, t=tmp_path) for item in argv)) == 2
    told = capsys.readouterr().err
    assert said in told and told.splitlines()[-1].startswith("error: ") and "Traceback" not in told
    assert (built / "dataset.json").read_bytes() == before


def test_what_is_not_a_finished_folder_is_refused(
    models: Path, built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert score(tmp_path / "empty", *by_text(models)) == 2
    assert "is no folder that data_prep has finished" in capsys.readouterr().err
    shard = next(iter(sorted(built.glob("*.tar"))))
    shard.unlink()
    assert score(built, *by_text(models)) == 2
    assert f"{shard.name} is not there, of 4 shards" in capsys.readouterr().err


def test_without_transformers_one_line_names_the_command(
    models: Path, built: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    assert score(built, *by_aesthetic(models)) == 2
    assert "pip install 'soratrain[hf]'" in capsys.readouterr().err
    assert score(built, *by_text(models)) == 0
