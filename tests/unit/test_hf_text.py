"""Promises of frozen text encoders, held against transformers on tiny random ones that it has saved itself."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hf_tiny import KINDS, save
from safetensors.torch import load_file, save_file
from test_encode import job, stored, write_shards, write_vae
from transformers import (
    AutoTokenizer,
    CLIPTextModel,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
    UMT5EncoderModel,
)

from soratrain.data.captions import text_name
from soratrain.data.datamodule import LatentData
from soratrain.data.manifest import write_captions
from soratrain.errors import ConfigError, DataError
from soratrain.models import hf_text
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_text import HFText

TEXTS = ["clip 3", "clip 0 clip 1 clip 2", "clip", "三只猫 café 7"]
CLASSES = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel, "clip": CLIPTextModel}


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_each_text_alone_without_padding(kind: str, tmp_path: Path) -> None:
    encoder = HFText(folder=str(save(kind, tmp_path)), dim=16)
    net, tokenizer = CLASSES[kind].from_pretrained(tmp_path).eval(), AutoTokenizer.from_pretrained(tmp_path)
    found = encoder.features(encoder.tokenize(TEXTS)[0])
    kept, cut = encoder.store(TEXTS)
    for text, features, held in zip(TEXTS, found, kept, strict=True):
        expected = net(input_ids=tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]
        assert features.shape == (1 + len(text.split()), 16)
        torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-5)
        assert held.dtype == torch.bfloat16 and torch.equal(held, features.to(torch.bfloat16))
    assert not cut
    assert HFText(folder=str(tmp_path), dim=16, max_tokens=3).store(TEXTS)[1] == {
        place for place, text in enumerate(TEXTS) if len(text.split()) > 2
    }


def test_texts_are_read_a_few_at_a_time_with_the_same_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = HFText(folder=str(save("t5", tmp_path)), dim=16)
    ids = [*encoder.tokenize(TEXTS)[0], []]
    whole = encoder.features(ids)
    monkeypatch.setattr(hf_text, "TOKENS_AT_ONCE", 7)
    assert [len(some) for some in hf_text.together([len(item) for item in ids])] == [2, 1, 1]
    for one, other in zip(encoder.features(ids), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert whole[-1].shape == (0, 16)


def test_longer_texts_are_cut_and_counted_their_closing_token_stays(tmp_path: Path) -> None:
    encoder = HFText(folder=str(save("t5", tmp_path)), dim=16, max_tokens=3)
    ids, cut = encoder.tokenize([*TEXTS, "7 " * 10_000])
    assert [len(item) for item in ids] == [3, 3, 2, 3, 3] and cut == 3
    assert all(item[-1] == 1 for item in ids)


def test_a_text_of_broken_characters_is_read(tmp_path: Path) -> None:
    encoder = HFText(folder=str(save("t5", tmp_path)), dim=16)
    assert encoder.tokenize(["clip \udcc3"])[0] == encoder.tokenize(["clip ?"])[0]


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_of_the_encoder_and_not_of_how_its_files_are_cut(kind: str, tmp_path: Path) -> None:
    save(kind, tmp_path / "one")
    save(kind, tmp_path / "many", shard="4KB")
    assert len(list((tmp_path / "many").glob("model-*.safetensors"))) > 2
    save(kind, tmp_path / "other", seed=1)
    one, many, other = (HFText(folder=str(tmp_path / name), dim=16) for name in ("one", "many", "other"))
    assert one.digest == many.digest != other.digest
    assert all(map(torch.equal, one.store(TEXTS)[0], many.store(TEXTS)[0]))
    pipeline = tmp_path / "pipeline"
    (pipeline / "tokenizer").mkdir(parents=True)
    (tmp_path / "one").rename(pipeline / "text_encoder")
    for file in (pipeline / "text_encoder").glob("*token*"):
        file.rename(pipeline / "tokenizer" / file.name)
    assert HFText(folder=str(pipeline), subfolder="text_encoder", dim=16).digest == one.digest
    words = json.loads((tmp_path / "many" / "tokenizer.json").read_text())
    words["model"]["vocab"]["<unk>"], words["model"]["vocab"]["clip"] = 3, 2
    (tmp_path / "many" / "tokenizer.json").write_text(json.dumps(words))
    assert HFText(folder=str(tmp_path / "many"), dim=16).digest != one.digest


def test_the_digest_leaves_out_the_half_that_does_not_read(tmp_path: Path) -> None:
    digest = HFText(folder=str(save("clip", tmp_path)), dim=16).digest
    state = load_file(tmp_path / "model.safetensors")
    renamed = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in state.items()}
    whole = renamed | {"vision_model.x": torch.ones(2), "logit_scale": torch.tensor(1.0)}
    save_file(whole, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = HFText(folder=str(tmp_path), dim=16)
    assert encoder.digest == digest
    encoder.load()


def test_a_whole_t5_or_one_that_is_pickled_is_the_same_encoder(tmp_path: Path) -> None:
    save("t5", tmp_path)
    encoder = HFText(folder=str(tmp_path), dim=16)
    own, expected = load_file(tmp_path / "model.safetensors"), encoder.store(TEXTS)[0]
    digest = encoder.digest
    torch.manual_seed(3)
    whole = T5ForConditionalGeneration(T5Config.from_pretrained(tmp_path))
    whole.load_state_dict(own, strict=False)
    whole.save_pretrained(tmp_path)
    assert len(load_file(tmp_path / "model.safetensors")) > len(own)
    (tmp_path / "pickled").mkdir()
    for file in tmp_path.glob("*.json"):
        (tmp_path / "pickled" / file.name).write_bytes(file.read_bytes())
    torch.save(own | {"encoder.embed_tokens.weight": own["shared.weight"]}, tmp_path / "pickled" / "pytorch_model.bin")
    for place in (tmp_path, tmp_path / "pickled"):
        again = HFText(folder=str(place), dim=16)
        assert again.digest == digest
        assert all(map(torch.equal, again.store(TEXTS)[0], expected))
    half = HFText(folder=str(tmp_path), dim=16, dtype="bf16")
    assert half.digest == digest and half.identity() != encoder.identity()
    for one, other in zip(half.store(TEXTS)[0], expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)


def test_the_features_of_a_caption_come_with_it_also_where_it_was_made_later(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    keys = [row.key for _, _, row in _encoded(tmp_path / "plain", tmp_path)]
    rows = [{"key": key, "type": "long", "text": "clip 7 8 9", "model": "m", "rev": "r", "lang": "en"} for key in keys]
    write_captions(tmp_path / "made" / "captions" / "r" / "part-00000.parquet", rows)
    folder = str(save("t5", tmp_path / "t5"))
    job(tmp_path, text=partial(FrozenText, folder=folder, dim=16), captions=str(tmp_path / "made"))()
    encoder = HFText(folder=folder, dim=16)
    for header, tensors, _ in stored(tmp_path / "out").values():
        for caption in (header["captions"][0]["text"], "clip 7 8 9"):
            expected = encoder.store([caption])[0][0]
            torch.testing.assert_close(tensors[text_name(caption)], expected, rtol=1e-2, atol=1e-2)
    folders = {"latents": str(tmp_path / "out"), "captions": str(tmp_path / "made")}
    mix = {"caption_mix": {"synthetic": 0.5, "original": 0.5}}
    data = LatentData(**folders, **mix, seed=0, max_steps=8, batch_size=2, max_batch_size=2)
    assert data.stored_texts() == {str(tmp_path / "out"): encoder.record()}
    shown = set()
    for batch in islice(iter(data.items()), 8):
        for caption, features in zip(batch.captions, batch.text, strict=True):
            shown.add(caption == "clip 7 8 9")
            torch.testing.assert_close(features, encoder.store([caption])[0][0], rtol=1e-2, atol=1e-2)
    assert shown == {True, False}


def _encoded(out: Path, place: Path) -> list:
    job(place, out=str(out))()
    return list(stored(out).values())


def test_latents_with_another_encoder_s_features_or_of_other_captions_are_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    text = partial(FrozenText, folder=str(save("t5", tmp_path / "t5")), dim=16)
    job(tmp_path, text=text)()
    job(tmp_path, text=text)()
    with pytest.raises(DataError, match="made with another text;"):
        job(tmp_path, text=partial(FrozenText, folder=str(save("t5", tmp_path / "other", seed=1)), dim=16))()
    with pytest.raises(DataError, match="made with another text;"):
        job(tmp_path, text=partial(FrozenText, folder=str(tmp_path / "t5"), dim=16, max_tokens=2))()
    assert "cut" not in caplog.text
    job(
        tmp_path, text=partial(FrozenText, folder=str(tmp_path / "t5"), dim=16, max_tokens=2), out=str(tmp_path / "2")
    )()
    assert "6 captions are longer than text.max_tokens and were cut" in caplog.text
    job(tmp_path, text=partial(text, features="live"), out=str(tmp_path / "live"))()
    data = LatentData(latents=str(tmp_path / "live"), seed=0, max_steps=1, batch_size=1)
    assert data.stored_texts() == {str(tmp_path / "live"): None}
    for number in (1, 2):
        row = {"key": f"{1:032x}", "type": "long", "text": f"clip {number}", "model": "m", "rev": "r", "lang": "en"}
        write_captions(tmp_path / f"made{number}" / "captions" / "r" / "part-00000.parquet", [row])
    options = {"text": text, "out": str(tmp_path / "later")}
    job(tmp_path, **options, captions=str(tmp_path / "made1"))()
    with pytest.raises(DataError, match="made with another text;"):
        job(tmp_path, **options, captions=str(tmp_path / "made2"))()


def test_what_cannot_be_read_is_one_line_that_names_the_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save("t5", tmp_path)
    with pytest.raises(ConfigError, match="set text.dim=16"):
        HFText(folder=str(tmp_path), dim=8)
    with pytest.raises(ConfigError, match="dtype='fp16'"):
        HFText(folder=str(tmp_path), dim=16, dtype="fp16")
    with pytest.raises(ConfigError, match="max_tokens=100 must be between 1 and 77"):
        HFText(folder=str(save("clip", tmp_path / "clip", words=77)), dim=16, max_tokens=100)
    with pytest.raises(DataError, match=r"text.folder=.*nowhere: is no folder; give .* \(OWNER/NAME\)$"):
        HFText(folder=str(tmp_path / "nowhere"), dim=16)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if "layer_norm" not in key}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="do not fit"):
        HFText(folder=str(tmp_path), dim=16).load()
    file.write_bytes(b"no weights")
    with pytest.raises(DataError, match="holds no text encoder that can be read"):
        _ = HFText(folder=str(tmp_path), dim=16).digest
    file.unlink()
    with pytest.raises(DataError, match="it has none of model.safetensors"):
        _ = HFText(folder=str(tmp_path), dim=16).digest
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="text.folder="):
        HFText(folder=str(tmp_path), dim=16)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install 'soratrain\\[hf\\]'"):
        HFText(folder=str(tmp_path), dim=16)


def test_an_encoder_on_the_hub_that_cannot_be_had_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        HFText(folder="nobody/nothing", dim=16)
    said = str(caught.value)
    assert "\n" not in said
    assert said.startswith("text.folder=nobody/nothing: is no folder here, and cannot be had from the hub (")
    assert said.endswith("download it where there is a network, and give its folder")


def test_an_encoder_on_the_hub_is_taken_from_what_was_downloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hub's cache as huggingface_hub lays it out: a repository's files under a revision that `main` names."""
    cache = tmp_path / "hub" / "models--somebody--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("0" * 40)
    for kind, name in (("t5", "text_encoder"), ("clip", "text_encoder_2")):
        here = cache / "snapshots" / ("0" * 40)
        save(kind, here / name)
        (here / name.replace("text_encoder", "tokenizer")).mkdir()
        for file in (here / name).glob("*token*"):
            file.rename(here / name.replace("text_encoder", "tokenizer") / file.name)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for kind, name in (("t5", "text_encoder"), ("clip", "text_encoder_2")):
        encoder = HFText(folder="somebody/tiny", subfolder=name, dim=16)
        here = HFText(folder=str(save(kind, tmp_path / kind)), dim=16)
        assert encoder.digest == here.digest
        assert all(map(torch.equal, encoder.store(TEXTS)[0], here.store(TEXTS)[0]))
