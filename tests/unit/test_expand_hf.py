"""Promises of expand=hf: a language model in this process, with a chat template or without, gone before we draw."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import hf_writer
import pytest
import torch
import transformers
from test_expand import moving, write_table

from soratrain.errors import DataError
from soratrain.expand.hf import HFExpansion, plain

TEXT = "A small|large red circle moves left, on a|the plain|grey background"


def save(folder: Path, text: str = TEXT, template: str | None = None, **kwargs: Any) -> str:
    start = "assistant:" if template == hf_writer.TEMPLATE else "Caption:"
    return str(hf_writer.save(folder / "model", hf_writer.chain(text, start), template=template, **kwargs))


@pytest.mark.parametrize("template", [None, hf_writer.TEMPLATE, hf_writer.REFUSING], ids=["none", "chat", "refusing"])
def test_a_model_goes_on_from_a_chat_or_from_a_plain_text(tmp_path: Path, template: str | None) -> None:
    found = HFExpansion(folder=save(tmp_path, template=template))(moving("red circle"), tmp_path)
    (text,) = (longer.text for longer in found.values())
    assert text in {
        f"A {size} red circle moves left, on {one} {ground} background"
        for size in ("small", "large")
        for one in ("a", "the")
        for ground in ("plain", "grey")
    }


def test_the_seed_settles_the_words_whatever_else_is_asked(tmp_path: Path) -> None:
    folder = save(tmp_path)
    prompts = moving(*(f"circle number {number}" for number in range(12)))

    def texts(name: str, asked: list[tuple[str, bool]], **options: Any) -> dict[str, str]:
        found = HFExpansion(folder=folder, **options)(asked, tmp_path / name)
        return {prompt: longer.text for (prompt, _), longer in found.items()}

    together = texts("together", prompts)
    assert len(set(together.values())) > 2
    assert texts("backwards", prompts[::-1]) == together
    assert texts("alone", prompts[5:6]) == {"circle number 5": together["circle number 5"]}
    assert texts("seed", prompts, seed=1) != together
    assert len(set(texts("likeliest", prompts, temperature=0.0).values())) == 1


def test_a_line_ends_what_goes_on_with_a_text(tmp_path: Path) -> None:
    follows = hf_writer.chain("A red circle \n another one of those")
    folder = hf_writer.save(tmp_path / "model", follows)
    found = HFExpansion(folder=str(folder), max_tokens=6)(moving("red circle"), tmp_path)
    assert [longer.text for longer in found.values()] == ["A red circle"]


def test_a_text_that_does_not_end_is_cut_off_and_the_prompt_stays(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tmp_path)
    assert HFExpansion(folder=folder, max_tokens=5)(moving("red circle"), tmp_path) == {}
    assert "1 of 1 prompts are drawn as they are, such as 'red circle': cut off" in caplog.text


def test_a_model_that_cannot_go_on_leaves_the_prompt_as_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = save(tmp_path)
    net = transformers.AutoModelForCausalLM.from_pretrained(folder)
    net.lm_head.weight.data.fill_(torch.nan)  # as fp16 makes of some models
    net.save_pretrained(folder)
    assert HFExpansion(folder=folder)(moving("red circle"), tmp_path) == {}
    assert (
        "1 of 1 prompts are drawn as they are" in caplog.text and "the model cannot go on (probability" in caplog.text
    )


def test_examples_give_way_where_a_model_reads_little(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = str(write_table(tmp_path / "made", range(20)))
    folder = save(tmp_path, places=140)
    options: dict[str, Any] = {"folder": folder, "captions": made, "examples": 8, "max_tokens": 20}
    assert len(HFExpansion(**options)(moving("red circle"), tmp_path)) == 1
    assert HFExpansion(**options)(moving("red " * 99), tmp_path) == {}
    assert "more than the model's 140 tokens" in caplog.text


def test_the_model_is_gone_when_prompts_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref] = []
    load = transformers.AutoModelForCausalLM.from_pretrained

    def watched(*args: Any, **kwargs: Any) -> Any:
        net, said = load(*args, **kwargs)
        held.append(weakref.ref(net))
        return net, said

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", watched)
    expand = HFExpansion(folder=save(tmp_path))
    expand(moving("red circle"), tmp_path)
    gc.collect()
    assert len(held) == 1 and held[0]() is None
    expand(moving("red circle"), tmp_path)
    assert len(held) == 1  # what was made before needs no model


def test_other_weights_make_other_texts(tmp_path: Path) -> None:
    folder = save(tmp_path)
    before = HFExpansion(folder=folder)(moving("red circle"), tmp_path)
    save(tmp_path, "Something else altogether")
    after = HFExpansion(folder=folder)(moving("red circle"), tmp_path)
    assert [longer.text for longer in after.values()] == ["Something else altogether"] and after != before


@pytest.mark.parametrize(("folder", "said"), [("nowhere", "is no folder"), (".", "holds no causal language model")])
def test_a_folder_without_a_model_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=f"expand.folder={folder}: {said}") as told:
        HFExpansion(folder=folder)(moving("red circle"), tmp_path)
    assert "\n" not in str(told.value)


def test_a_plain_text_shows_pairs_and_ends_where_the_caption_begins() -> None:
    turns = ["do this\n\nshort", "long", "prompt\n(Repeat)"]
    messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
    assert plain(messages) == "do this\n\nText: short\nCaption: long\n\nText: prompt (Repeat)\nCaption:"
