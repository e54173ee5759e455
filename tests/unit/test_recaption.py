"""Promises of stage=recaption: every clip its own caption, nothing lost, nothing done twice."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import data_tiny
import pyarrow.parquet as pq
import pytest
import torch
import vlm_parts_tiny

from soratrain.captions.native import NativeEngine
from soratrain.data.buckets import Native
from soratrain.data.caption_table import open_captions
from soratrain.data.datamodule import VideoData
from soratrain.data.reading import read_manifest
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.captioner import Captioner
from soratrain.stages.pace import Pace
from soratrain.stages.recaption import Recaption

MODELS = {"captioner", "original"}
SHAPES = [(16, 16, 5), (16, 32, 9), (16, 16, 1), (16, 16, 5), (32, 16, 5), (16, 16, 5), (16, 16, 1), (16, 32, 9)]
NET = partial(
    Captioner, dim=24, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, queries=2, table=64
)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Eight clips in several shards; a clip's first frame says by its grey which it is."""
    folder = data_tiny.write_clips(tmp_path / "shards", SHAPES, max_bytes=12_000)
    assert len(read_manifest(folder).shards) > 1
    return folder


def save_captioner(
    folder: Path, styles: tuple[str, ...] = ("short", "long"), seed: int = 0, *, talking: bool = False
) -> Path:
    """Save a random captioner; unless it is `talking` it says nothing."""
    torch.manual_seed(seed)
    factory = partial(NET, max_bytes=16)
    net = factory()
    if talking:
        torch.nn.init.normal_(net.decoder.head.weight[:256], std=0.5)
    net.teach(["sixteen letters."] * len(styles), styles)
    weights.save(folder, "captioner", net, factory, {})
    return folder


@pytest.fixture
def captioner(tmp_path: Path) -> Path:
    return save_captioner(tmp_path / "captioner")


@pytest.fixture
def seer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the captioner say the grey of a clip's first frame, and its rate, so that a caption tells its clip."""

    def look(self, pixels, fps):
        grey = (pixels[:, :, 0].mean((1, 2, 3)) + 1) * 127.5
        return torch.stack([grey, fps], dim=1)[:, None], grey[:, None]

    def say(self, pooled, style, **options):
        return [f"a {style} view of grey {row[0]:.0f} at {row[1]:.0f}" for row in pooled[:, 0].tolist()]

    monkeypatch.setattr(Captioner, "look", look)
    monkeypatch.setattr(Captioner, "say", say)


def recaption(shards: Path, captioner: Path, out: Path, **changes) -> Recaption:
    of_engine = {name: changes.pop(name) for name in ("batch_size", "pixels_per_batch", "top_p") if name in changes}
    engine = NativeEngine(captioner=str(captioner), **of_engine)
    return Recaption(out=str(out), shards=str(shards), engine=engine, buckets=Native(), **changes)


def texts(out: Path) -> dict[tuple[str, str], str]:
    table = open_captions(out)
    rows = [row for number in range(len(SHAPES)) for row in table.get(data_tiny.key(number))]
    assert len(rows) == len(table)
    return {(row["key"], row["type"]): row["text"] for row in rows}


def contents(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def grey_of(text: str) -> int:
    return int(text.split("grey ")[1].split()[0])


@pytest.mark.parametrize("batch_size", [1, 3, 128])
def test_every_clip_gets_its_own_caption_in_every_style(shards, captioner, seer, tmp_path, batch_size):
    figures = recaption(shards, captioner, tmp_path / "out", batch_size=batch_size)()
    said = texts(tmp_path / "out")
    assert len(said) == figures["captions"] == 2 * len(SHAPES)
    for number in range(len(SHAPES)):
        for style in ("short", "long"):
            text = said[data_tiny.key(number), style]
            assert text.startswith(f"a {style} view") and text.endswith(" at 8")
            assert abs(grey_of(text) - data_tiny.grey(number, 0)) <= 3


def test_captions_name_their_captioner_and_are_joined_by_the_loader(shards, captioner, seer, tmp_path):
    recaption(shards, captioner, tmp_path / "out")()
    (rev,) = (tmp_path / "out" / "captions").iterdir()
    rows = [row for path in sorted(rev.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert {row["rev"] for row in rows} == {rev.name} and {row["model"] for row in rows} == {"captioner"}
    data = VideoData(
        shards=str(shards),
        captions=str(tmp_path / "out"),
        buckets=Native(),
        seed=0,
        max_steps=4,
        batch_size=1,
        caption_mix={"synthetic": 1.0, "original": 0.0},
    )
    data.setup("fit")
    for batch in data.train_dataloader():
        assert grey_of(batch.captions[0]) == pytest.approx(float(batch.video[0, 0].float().mean()), abs=3)


def test_a_stopped_job_goes_on_and_does_nothing_twice(shards, captioner, seer, tmp_path, monkeypatch, caplog):
    recaption(shards, captioner, tmp_path / "whole", batch_size=1)()
    manifest = read_manifest(shards)
    first = int((manifest.shard == 0).sum())
    assert 1 < first < len(SHAPES) - 1
    say, asked = Captioner.say, []

    def stop(self, pooled, style, **options):
        if len(asked) == 2 * first + 3:  # in the second shard, between two styles of its second clip
            raise KeyboardInterrupt
        asked.append(len(pooled))
        return say(self, pooled, style, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "say", stop)
        with pytest.raises(KeyboardInterrupt):
            recaption(shards, captioner, tmp_path / "out", batch_size=1)()
    (rev,) = (tmp_path / "out" / "captions").iterdir()
    finished = {path: path.stat().st_mtime_ns for path in rev.glob("*.parquet")}
    assert len(finished) == 1 < len(manifest.shards)
    (journal,) = rev.glob(".part-*.jsonl")
    journal.write_bytes(journal.read_bytes() + b'{"rows": [{"key"')  # a process killed while it wrote
    asked.clear()
    monkeypatch.setattr("soratrain.stages.pace.EVERY", 0.0)  # a line a clip
    caplog.set_level("INFO", logger="soratrain")
    skip, skipped = Pace.skip, []
    monkeypatch.setattr(Pace, "skip", lambda self, *done: skipped.append(done) or skip(self, *done))
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "say", lambda self, *given, **options: asked.append(1) or say(self, *given, **options))
        figures = recaption(shards, captioner, tmp_path / "out", batch_size=1)()
    assert len(asked) == 2 * (len(SHAPES) - first - 1)  # what was whole is not asked again
    left = len(SHAPES) - first
    far = [line for line in caplog.messages if " %; about " in line]
    assert far[-1].startswith(f"{left - 1}/{left} clips, ") and skipped == [(1, 1)]
    assert all(path.stat().st_mtime_ns == time for path, time in finished.items())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert figures["captions"] == 2 * len(SHAPES)
    with monkeypatch.context() as patch:
        patch.setattr(Captioner, "say", None)  # nothing is left to say
        again = recaption(shards, captioner, tmp_path / "out", batch_size=1)()
    assert {**again, "captions_per_s": 0} == {**figures, "captions_per_s": 0}


def test_a_rejected_caption_is_asked_for_again_by_chance(shards, captioner, seer, tmp_path, monkeypatch):
    say, draws = Captioner.say, []

    def stutter(self, pooled, style, **options):
        if options:
            draws.extend(options["draws"])
            assert options["top_p"] == 0.9
            return say(self, pooled, style)
        return ["red red red red" for _ in pooled] if style == "short" else say(self, pooled, style)

    monkeypatch.setattr(Captioner, "say", stutter)
    figures = recaption(shards, captioner, tmp_path / "out")()
    assert figures["rejected"] == len(SHAPES) and figures["originals"] == 0
    assert len(set(draws)) == len(SHAPES)
    for (key, _), text in texts(tmp_path / "out").items():
        assert abs(grey_of(text) - data_tiny.grey(int(key, 16), 0)) <= 3


def test_what_stays_rejected_keeps_the_original_caption_and_much_of_it_is_said(
    shards, captioner, seer, tmp_path, monkeypatch, caplog
):
    say = Captioner.say
    monkeypatch.setattr(
        Captioner,
        "say",
        lambda self, pooled, style, **options: ["" for _ in pooled] if style == "short" else say(self, pooled, style),
    )
    figures = recaption(shards, captioner, tmp_path / "out", attempts=2)()
    assert figures["rejected"] == figures["rejected_cut_off"] == 3 * len(SHAPES)
    assert figures["originals"] == len(SHAPES)
    assert f"{len(SHAPES)} captions are those that clips came with, and 0 are missing" in caplog.text
    assert f"(cut_off {3 * len(SHAPES)}); train it longer" in caplog.text
    told = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert told["complete"] and told["figures"]["short"]["cut_off"] == 3 * len(SHAPES)
    assert "cut_off" not in told["figures"]["long"]
    for number in range(len(SHAPES)):
        by_style = {row["type"]: row for row in open_captions(tmp_path / "out").get(data_tiny.key(number))}
        assert by_style["short"]["text"] == f"short original {number}"
        assert by_style["short"]["model"] == "original" and by_style["long"]["model"] == "captioner"
        assert {row["lang"] for row in by_style.values()} == {"en"}


def test_the_words_shared_with_given_captions_are_a_mean_over_clips_for_each_style(
    tmp_path, shards, captioner, monkeypatch
):
    monkeypatch.setattr(Captioner, "say", lambda self, pooled, style, **options: ["short original 0" for _ in pooled])
    result, others = recaption(shards, captioner, tmp_path / "out")(), len(SHAPES) - 1
    figures = json.loads((tmp_path / "out" / "captions.json").read_text())["figures"]
    short, long = (1 + others * 2 / 3) / len(SHAPES), (2 / 3 + others / 3) / len(SHAPES)
    assert figures["short"]["agreement"] == pytest.approx(short)
    assert figures["long"]["agreement"] == pytest.approx(long)
    assert result["agreement"] == pytest.approx((short + long) / 2)


def test_a_clip_that_had_no_caption_and_gets_none_has_no_row(tmp_path, captioner, seer, monkeypatch):
    monkeypatch.setattr(data_tiny, "captions", lambda number: [])
    shards = data_tiny.write_clips(tmp_path / "silent", SHAPES[:3])
    monkeypatch.setattr(Captioner, "say", lambda self, pooled, style, **options: ["" for _ in pooled])
    figures = recaption(shards, captioner, tmp_path / "out")()
    assert figures["missing"] == 6 and figures["captions"] == 0


def test_an_unreadable_clip_is_counted_and_the_others_are_described(shards, captioner, seer, tmp_path):
    row = next(row for row in read_manifest(shards).rows() if row.key == data_tiny.key(4))
    with open(shards / row.shard, "r+b") as file:
        file.seek(row.media_offset)
        file.write(bytes(row.media_length))
    figures = recaption(shards, captioner, tmp_path / "out")()
    assert figures["unreadable"] == 1
    (failure,) = map(json.loads, (tmp_path / "out" / "failures.jsonl").read_text().splitlines())
    assert failure["key"] == data_tiny.key(4) and failure["shard"] == row.shard and "CRC-32" in failure["reason"]
    assert {key for key, _ in texts(tmp_path / "out")} == {data_tiny.key(n) for n in range(len(SHAPES)) if n != 4}


def test_captions_of_another_captioner_are_never_mixed_in(shards, captioner, seer, tmp_path):
    recaption(shards, captioner, tmp_path / "out")()
    other = save_captioner(tmp_path / "other", seed=1)
    with pytest.raises(DataError, match="another captioner.*fresh=true"):
        recaption(shards, other, tmp_path / "out")()


def test_only_styles_that_were_trained_can_be_asked_for(shards, seer, tmp_path):
    short = save_captioner(tmp_path / "short", styles=("short",))
    recaption(shards, short, tmp_path / "out")()
    assert {style for _, style in texts(tmp_path / "out")} == {"short"}
    with pytest.raises(ConfigError, match=r"\['short'\].*'camera'"):
        recaption(shards, short, tmp_path / "out", styles=["short", "camera"])()
    with pytest.raises(ConfigError, match="has learned no style; train it on clips with captions"):
        recaption(shards, save_captioner(tmp_path / "none", styles=()), tmp_path / "new")()


def test_a_device_that_holds_less_is_one_line_and_a_smaller_batch_goes_on(
    shards, captioner, seer, tmp_path, monkeypatch
):
    look, limit = Captioner.look, 1

    def small(self, pixels, fps):
        if len(pixels) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return look(self, pixels, fps)

    monkeypatch.setattr(Captioner, "look", small)
    with pytest.raises(ConfigError, match=r"engine.batch_size=128, engine.pixels_per_batch=.* goes on$"):
        recaption(shards, captioner, tmp_path / "out")()
    assert recaption(shards, captioner, tmp_path / "out", batch_size=limit)()["captions"] == 2 * len(SHAPES)


def test_a_real_captioner_writes_what_it_generates(shards, tmp_path):
    captioner = save_captioner(tmp_path / "talking", talking=True)
    figures = recaption(shards, captioner, tmp_path / "out", attempts=1)()
    assert figures["captions"] == 2 * len(SHAPES)
    assert figures["rejected"] >= figures["originals"]
    parts = sorted((tmp_path / "out" / "captions").glob("*/*.json"))
    counts = [json.loads(path.read_text())["counts"] for path in parts]
    assert sum(part[f"{style}/captions"] for part in counts for style in ("short", "long")) == 2 * len(SHAPES)


def test_a_captioner_made_of_others_nets_describes_as_well(shards, tmp_path):
    torch.manual_seed(0)
    parts = vlm_parts_tiny.save_encoder(tmp_path / "eye"), vlm_parts_tiny.save_language(tmp_path / "tongue")
    make = vlm_parts_tiny.factory(*parts)
    net = make()
    net.read_stored()
    net.teach(["a disc moves"] * 2, ["short", "tags"])
    weights.save(tmp_path / "vlm", "captioner", net, make, net.record())
    figures = recaption(shards, tmp_path / "vlm", tmp_path / "out", batch_size=3)()
    rows = [row for number in range(len(SHAPES)) for row in open_captions(tmp_path / "out").get(data_tiny.key(number))]
    assert figures["captions"] == len(rows) == 2 * len(SHAPES)
    assert {row["type"] for row in rows} == {"short", "tags"} and {row["model"] for row in rows} <= MODELS


@pytest.mark.parametrize(
    "changes",
    [
        {"batch_size": 0},
        {"pixels_per_batch": 0},
        {"top_p": 0.0},
        {"attempts": -1},
        {"styles": []},
        {"styles": ["a", "a"]},
    ],
)
def test_a_value_out_of_range_is_refused(changes, tmp_path):
    with pytest.raises(ConfigError):
        recaption(tmp_path, tmp_path, tmp_path, **changes)
