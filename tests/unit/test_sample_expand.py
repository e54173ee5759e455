"""Promises of stage=sample with longer prompts: both are in the notes, and the same command draws the same clips."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import ChatHost, chatting
from sample_chain import Chain, write_files

from soratrain.compose import compose
from soratrain.distributed.ranks import Ranks
from soratrain.errors import ConfigError
from soratrain.expand.openai import OpenAIExpansion
from soratrain.rules import validate
from soratrain.run import instantiate
from soratrain.stages.sample_tasks import T2V

SETTINGS: dict[str, Any] = {"size": "32x32", "frames": 5, "fps": 8.0}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Chain:
    return write_files(tmp_path_factory.mktemp("chain"))


@pytest.fixture
def host() -> Iterator[ChatHost]:
    with chatting(longer) as server:
        yield server


def longer(body: dict[str, Any]) -> str:
    return f"The long form of {body['messages'][-1]['content'].rpartition(chr(10))[2]}."


def by(host: ChatHost) -> OpenAIExpansion:
    return OpenAIExpansion(url=host.url, model="tiny", timeout_s=1.0, retries=0, temperature=0.0)


def notes(file: str) -> dict[str, Any]:
    return json.loads(Path(file).with_suffix(".json").read_text())


def test_both_prompts_are_in_the_notes_and_the_longer_one_is_drawn(chain: Chain, host: ChatHost) -> None:
    made = chain.job(T2V(), prompt=["a cat", "三只猫"], expand=by(host), out=chain.file("long"), **SETTINGS)()
    found = [notes(file) for file in made["files"]]
    assert [note["prompt"] for note in found] == ["a cat", "三只猫"]
    assert [note["expanded"] for note in found] == ["The long form of a cat.", "The long form of 三只猫."]
    assert found[0]["expanded_by"] == {"engine": "openai", "model": "tiny", "seed": 0}
    assert [Path(file).name[:4] for file in made["files"]] == ["a-ca", "三只猫-"]
    alone = chain.job(T2V(), prompt="The long form of a cat.", out=chain.file("alone"), **SETTINGS)()
    assert Path(alone["files"][0]).read_bytes() == Path(made["files"][0]).read_bytes()  # its noise is the longer one's


def test_the_same_command_draws_the_same_without_the_model(chain: Chain, host: ChatHost) -> None:
    def draw() -> dict[str, Any]:
        return chain.job(T2V(), prompt="a dog", samples=2, expand=by(host), out=chain.file("again"), **SETTINGS)()

    made = draw()
    assert made["drawn"] == 2 and len(host.asked) == 1
    before = Path(made["files"][0]).read_bytes()
    host.always = 500
    assert draw()["drawn"] == 0
    Path(made["files"][0]).unlink()
    again = draw()
    assert again["drawn"] == 1 and again["files"] == made["files"] and len(host.asked) == 1
    assert Path(made["files"][0]).read_bytes() == before


def test_a_sample_whose_prompt_stayed_short_is_the_one_of_old(chain: Chain, host: ChatHost) -> None:
    old = chain.job(T2V(), prompt="a horse", out=chain.file("old"), **SETTINGS)()
    host.always = 500
    new = chain.job(T2V(), prompt="a horse", expand=by(host), out=chain.file("old"), **SETTINGS)()
    assert new["drawn"] == 0 and new["files"] == old["files"] and "expanded" not in notes(old["files"][0])


def test_lines_of_a_file_are_made_longer_each_with_what_it_overrides(chain: Chain, host: ChatHost) -> None:
    rows = [{"prompt": "one", "seed": 5}, {"prompt": "two", "frames": 1, "size": "48x32"}]
    lines = chain.folder / "prompts.jsonl"
    lines.write_text("\n".join(map(json.dumps, rows)))
    made = chain.job(T2V(), prompts_file=str(lines), expand=by(host), out=chain.file("lines"), **SETTINGS)()
    found = [notes(file) for file in made["files"]]
    assert [(note["expanded"], note["seed"], note["size"]) for note in found] == [
        ("The long form of one.", 5, "32x32"),
        ("The long form of two.", 0, "48x32"),
    ]
    kinds = {body["messages"][-1]["content"].split(".")[0] for body in host.asked}
    assert kinds == {"You write captions of video clips", "You write captions of pictures"}


def test_a_longer_prompt_is_cut_as_any_other(chain: Chain, host: ChatHost, caplog: pytest.LogCaptureFixture) -> None:
    host.answer = lambda body: " ".join(map(str, range(1000)))
    with caplog.at_level(logging.WARNING):
        made = chain.job(T2V(), prompt="a cow", expand=by(host), out=chain.file("cut"), **SETTINGS)()
    assert made["drawn"] == 1 and "1 of 1 prompts are longer than" in caplog.text


def test_one_rank_has_prompts_made_and_all_draw_the_same(
    chain: Chain, host: ChatHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Any] = []
    for rank in range(2):
        job = chain.job(T2V(), prompt="a bird", expand=by(host), out=chain.file("ranks"), **SETTINGS)

        def together(self: Ranks, work: Any) -> list[Any]:
            told.append(work())
            return told[:1]  # what the first rank has

        monkeypatch.setattr(Ranks, "together", together)
        job._lengthen(Ranks(rank, 2))
        assert [item.prompt for item in job.items] == ["The long form of a bird."]
    assert len(host.asked) == 1 and told[1] == {}


def test_the_group_of_the_config_builds_it() -> None:
    words = ["stage=sample", "machine=laptop", "prompt=x", "machine.precision=32-true"]
    for engine, own in (("openai", ["expand.model=tiny"]), ("hf", ["expand.folder=somewhere"]), ("none", [])):
        config, _ = compose([*words, f"expand={engine}", *own])
        validate(config)
        assert bool(config["expand"]) == (engine != "none")
        if own:
            built = instantiate(config["expand"])
            assert built.name == engine and built.captions == "outputs/default/recaption/base"
    for wrong, said in (
        (["expand=openai"], "expand.model"),
        (["expand=openai", "expand.model=tiny", "expand.ulr=x"], "expand.ulr.*did you mean 'url'"),
        (["expand=gpt"], "expand=gpt: no such option"),
        (["expand=openai", "expand.model=tiny", "expand.retries=many"], "expand.retries='many'.*whole number"),
    ):
        with pytest.raises(ConfigError, match=said):
            validate(compose([*words, *wrong])[0])
    with pytest.raises(ConfigError, match="expand: stage=dit draws no prompts"):
        validate(compose(["stage=dit", "machine=laptop", "expand=openai", "expand.model=tiny"])[0])
