"""Promises of frozen text encoders, held against transformers on tiny random ones that it has saved itself."""

from __future__ import annotations

import json
import sys
from functools import partial
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_encode import job, stored, write_shards, write_vae
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

from soratrain.data.captions import text_name
from soratrain.data.datamodule import LatentData
from soratrain.data.manifest import write_captions
from soratrain.errors import ConfigError, DataError
from soratrain.models.hf_text import HFText

TEXTS = ["clip 3", "clip 0 clip 1 clip 2", "clip"]


def save(kind: str, folder: Path, seed: int = 0) -> Path:
    """Save a random encoder of width 16 and its tokenizer; a word is a token, and `</s>` ends a text."""
    words = {word: index for index, word in enumerate(["<pad>", "</s>", "<unk>", "clip", *map(str, range(10))])}
    raw = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    raw.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    torch.manual_seed(seed)
    if kind == "t5":
        net = T5EncoderModel(T5Config(vocab_size=16, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2))
    else:
        sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        net = CLIPTextModel(CLIPTextConfig(vocab_size=16, eos_token_id=1, pad_token_id=0, bos_token_id=2, **sizes))
    net.save_pretrained(folder)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_features_are_those_of_each_text_alone_without_padding(kind: str, tmp_path: Path) -> None:
    encoder = HFText(folder=str(save(kind, tmp_path)), dim=16)
    found = encoder.store(TEXTS)
    for text, features in zip(TEXTS, found, strict=True):
        told = encoder.tokenizer(text, return_tensors="pt")
        expected = encoder.net(input_ids=told["input_ids"]).last_hidden_state[0]
        assert features.shape == (1 + len(text.split()), 16) and features.dtype == torch.bfloat16
        torch.testing.assert_close(features.float(), expected, rtol=1e-2, atol=1e-2)


def test_longer_texts_are_cut(tmp_path: Path) -> None:
    encoder = HFText(folder=str(save("t5", tmp_path)), dim=16, max_tokens=3)
    assert [len(features) for features in encoder.store(TEXTS)] == [3, 3, 2]


def test_the_features_of_a_caption_come_with_it_also_where_it_was_made_later(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    keys = [row.key for _, _, row in _encoded(tmp_path / "plain", tmp_path)]
    rows = [{"key": key, "type": "long", "text": "clip 7 8 9", "model": "m", "rev": "r", "lang": "en"} for key in keys]
    write_captions(tmp_path / "made" / "captions" / "r" / "part-00000.parquet", rows)
    text = partial(HFText, folder=str(save("t5", tmp_path / "t5")), dim=16)
    job(tmp_path, text=text, captions=str(tmp_path / "made"))()
    encoder = text()
    for header, tensors, _ in stored(tmp_path / "out").values():
        for caption in (header["captions"][0]["text"], "clip 7 8 9"):
            torch.testing.assert_close(tensors[text_name(caption)], encoder.store([caption])[0], rtol=1e-2, atol=1e-2)
    folders = {"latents": str(tmp_path / "out"), "captions": str(tmp_path / "made")}
    mix = {"caption_mix": {"synthetic": 0.5, "original": 0.5}}
    data = LatentData(**folders, **mix, seed=0, max_steps=8, batch_size=2, max_batch_size=2)
    shown = set()
    for batch in islice(iter(data.items()), 8):
        for caption, features in zip(batch.captions, batch.text, strict=True):
            shown.add(caption == "clip 7 8 9")
            expected = encoder.store([caption])[0].float()
            torch.testing.assert_close(features, expected, rtol=1e-2, atol=1e-2)
    assert shown == {True, False}


def _encoded(out: Path, place: Path) -> list:
    job(place, out=str(out))()
    return list(stored(out).values())


def test_latents_with_another_encoder_s_features_or_of_other_captions_are_refused(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    text = partial(HFText, folder=str(save("t5", tmp_path / "t5")), dim=16)
    job(tmp_path, text=text)()
    job(tmp_path, text=text)()
    with pytest.raises(DataError, match="made with another text;"):
        job(tmp_path, text=partial(HFText, folder=str(save("t5", tmp_path / "other", seed=1)), dim=16))()
    with pytest.raises(DataError, match="made with another text;"):
        job(tmp_path, text=partial(HFText, folder=str(tmp_path / "t5"), dim=16, max_tokens=2))()
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
    with pytest.raises(DataError, match="text.folder=.*nowhere"):
        HFText(folder=str(tmp_path / "nowhere"), dim=16)
    file = tmp_path / "model.safetensors"
    state = load_file(file)
    save_file({key: value for key, value in state.items() if "layer_norm" not in key}, file, metadata={"format": "pt"})
    with pytest.raises(DataError, match="do not fit"):
        HFText(folder=str(tmp_path), dim=16)
    (tmp_path / "config.json").write_text(json.dumps({}))
    with pytest.raises(DataError, match="text.folder="):
        HFText(folder=str(tmp_path), dim=16)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match="pip install 'soratrain\\[hf\\]'"):
        HFText(folder=str(tmp_path), dim=16)
