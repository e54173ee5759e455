"""Promises of engine=hf: any model that takes pictures and a prompt describes clips, alone or in a batch."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import data_tiny
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import vlm_tiny

from soratrain.captions.engine import Answer, Question, Seen
from soratrain.captions.hf import HFEngine
from soratrain.data.buckets import Native
from soratrain.errors import ConfigError, DataError
from soratrain.stages.recaption import Recaption

PROMPTS = {"short": "Be brief.", "long": "Tell all that there is to be seen."}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vlm_tiny.save(tmp_path_factory.mktemp("vlm") / "tiny-llava")


def opened(folder: Path, **changes) -> HFEngine:
    engine = HFEngine(folder=str(folder), dtype="fp32", **{"max_tokens": 12, "max_side": 32} | changes)
    engine.open(torch.device("cpu"), False, PROMPTS)
    return engine


def clip(number: int, frames: int) -> Seen:
    rng = np.random.default_rng(number)
    return Seen(data_tiny.key(number), rng.integers(0, 255, (frames, 28, 40, 3), dtype=np.uint8), 8.0, frames * 4 - 3)


CLIPS = [clip(0, 3), clip(1, 1), clip(2, 2)]
QUESTIONS = [Question(place, style, None) for place in range(3) for style in PROMPTS]


def test_a_batch_answers_as_clips_do_one_by_one(model):
    together, alone = opened(model), opened(model, batch_size=1)
    said = together.ask(together.look(CLIPS), QUESTIONS)
    assert said == alone.ask(alone.look(CLIPS), QUESTIONS)
    assert len({answer.text for answer in said}) > 3  # clips and prompts matter
    assert all(answer.cut or len(answer.text) < 12 for answer in said)


def test_a_second_attempt_is_by_chance_that_its_draw_decides(model):
    engine = opened(model, temperature=2.0, top_p=1.0)
    looked = engine.look(CLIPS)
    before = torch.random.get_rng_state()
    (one,), (same,), (other,) = (engine.ask(looked, [Question(0, "short", draw)]) for draw in (1, 1, 2))
    assert one == same != other
    assert torch.equal(torch.random.get_rng_state(), before)


def test_what_ends_is_whole_and_what_does_not_is_cut(model):
    engine = opened(model, max_tokens=4)
    assert engine._answer([70, 71, 1, 0], 4) == Answer(engine.tokenizer.decode([70, 71]))
    assert engine._answer([70, 71, 72, 73], 4).cut
    assert engine._answer([1, 0, 0, 0], 4) == Answer("")


def test_a_model_is_asked_through_its_template_or_with_bare_words(model, tmp_path):
    assert opened(model)._words("Say.", 2) == "<user><image><image>Say.<bot>"
    bare = opened(vlm_tiny.save(tmp_path / "bare", template=None))
    assert bare._words("Say.", 2) == "<image><image>\nSay."
    bare.try_out()
    assert len(bare.ask(bare.look(CLIPS), QUESTIONS)) == 6
    spoken = "{% for message in messages %}<user>{{ message['content'] }}<bot>{% endfor %}"
    bare.tokenizer.chat_template = spoken
    assert bare._words("Say.", 1) == "<user><image>\nSay.<bot>"


def test_a_model_of_one_picture_takes_one(model, monkeypatch):
    engine = opened(model, max_frames=1)
    engine.mark, engine.processor.chat_template, engine.tokenizer.chat_template = "", None, None
    assert engine._words("Say.", 1) == "Say."
    given = {}

    def process(images, text, **options):
        given.update(images=images, text=text)
        raise ValueError("seen")

    monkeypatch.setattr(type(engine.processor), "__call__", lambda self, **options: process(**options))
    with pytest.raises(ConfigError, match=r"does not take 1 pictures and a prompt \(seen\); try engine.max_frames=1"):
        engine.try_out()
    assert len(given["images"]) == 1 and not isinstance(given["images"][0], list)


def test_the_revision_tells_weights_prompts_and_settings_apart(model, tmp_path):
    identity = opened(model).identity()
    assert identity == opened(model, batch_size=2, offline=True).identity()
    copy = shutil.copytree(model, tmp_path / "copy")
    assert opened(copy).identity() == identity
    said = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps({**said, "repetition_penalty": 1.2}))
    assert opened(copy).identity() != identity
    assert opened(model, max_side=16).identity() != identity != opened(model, max_tokens=13).identity()
    other = opened(model)
    other.prompts = {"short": "Be very brief."}
    assert other.identity() != identity != opened(vlm_tiny.save(tmp_path / "other", seed=1)).identity()


def test_every_clip_is_described_and_named_after_the_model(model, tmp_path):
    shapes = [(16, 16, 5), (16, 32, 9), (16, 16, 1)]
    shards = data_tiny.write_clips(tmp_path / "shards", shapes)

    def make(out: str, **changes) -> dict[str, float]:
        engine = HFEngine(folder=str(model), dtype="fp32", max_tokens=8, max_side=32, **changes)
        job = Recaption(out=str(tmp_path / out), shards=str(shards), engine=engine, buckets=Native(), prompts=PROMPTS)
        return job()

    figures = make("out")
    assert figures["captions"] == 6
    assert figures["originals"] + figures["missing"] <= 6
    (table,) = (tmp_path / "out" / "captions").glob("*/*.parquet")
    rows = pq.read_table(table).to_pylist()
    assert {row["model"] for row in rows} <= {"tiny-llava", "original"}
    assert {row["rev"] for row in rows} == {table.parent.name}
    told = json.loads((tmp_path / "out" / "captions.json").read_text())
    assert told["prompts"] == PROMPTS and told["model"] == "tiny-llava" and told["complete"]
    make("again", batch_size=2)
    (same,) = (tmp_path / "again" / "captions").glob("*/*.parquet")
    assert same.parent.name == table.parent.name


def test_a_clip_that_the_processor_does_not_take_costs_no_other(model, monkeypatch):
    engine = opened(model)
    expected, process = engine.ask(engine.look(CLIPS), QUESTIONS), type(engine.processor).__call__

    def narrow(self, images, **options):
        if any(picture.width > 8 * picture.height for some in images for picture in some):
            raise ValueError("absolute aspect ratio must be smaller than 8")
        return process(self, images=images, **options)

    monkeypatch.setattr(type(engine.processor), "__call__", narrow)
    wide = Seen(data_tiny.key(9), np.zeros((2, 2, 40, 3), np.uint8), 8.0, 5)
    looked = engine.look([CLIPS[0], wide, *CLIPS[1:]])
    said = engine.ask(looked, [Question(place, style, None) for place in range(4) for style in PROMPTS])
    assert said[:2] + said[4:] == expected
    assert all(answer.final and "aspect ratio" in answer.failure for answer in said[2:4])


def test_what_is_no_such_model_is_said_in_one_line(tmp_path, model):
    engine = HFEngine(folder=str(tmp_path))
    with pytest.raises(DataError, match=r"engine.folder=.*holds no image-text-to-text model that can be read"):
        engine.open(torch.device("cpu"), False, PROMPTS)
    with pytest.raises(DataError, match="is no folder; give one that save_pretrained wrote"):
        HFEngine(folder="no/such/folder").open(torch.device("cpu"), False, PROMPTS)
    deaf = shutil.copytree(model, tmp_path / "deaf")
    for file in ("processor_config.json", "preprocessor_config.json"):
        (deaf / file).unlink(missing_ok=True)
    with pytest.raises(DataError, match=r"engine.folder=.*deaf"):
        opened(deaf)


@pytest.mark.parametrize(
    "changes", [{"dtype": "int8"}, {"batch_size": 0}, {"max_tokens": 0}, {"top_p": 0.0}, {"temperature": 0.0}]
)
def test_a_value_out_of_range_is_refused(changes):
    with pytest.raises(ConfigError, match=f"engine.{next(iter(changes))}="):
        HFEngine(folder="x", **changes)
