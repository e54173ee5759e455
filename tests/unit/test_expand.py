"""Promises of prompt expansion: which examples, what of a reply is taken, what is asked again, what is kept."""

from __future__ import annotations

import json
import logging
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import data_tiny
import pytest
from chat_server import ChatHost, chatting
from data_tiny import fields, key

from soratrain.chat import Reply
from soratrain.data.manifest import write_captions
from soratrain.errors import ChatError, ConfigError
from soratrain.expand.cache import NAME
from soratrain.expand.examples import draw_examples
from soratrain.expand.openai import OpenAIExpansion
from soratrain.expand.replies import caption_of, quotes

LONG = "A small red circle moves slowly to the left on a plain black background, and the camera does not move."


@pytest.fixture
def host() -> Iterator[ChatHost]:
    with chatting(lambda body: LONG) as server:
        yield server


def expansion(host: ChatHost, **options: Any) -> OpenAIExpansion:
    fast = {"timeout_s": 0.5, "retries": 1, "backoff_s": 0.01}
    return OpenAIExpansion(url=host.url, model="tiny", **{**fast, **options})


def moving(*prompts: str) -> list[tuple[str, bool]]:
    return [(prompt, False) for prompt in prompts]


def write_table(folder: Path, numbers: range, model: str = "captioner") -> Path:
    texts = {"short": "a clip {}", "long": "A long text of clip {}, with details."}
    rows = [
        {"key": key(n), "type": kind, "text": text.format(n), "model": model, "rev": "r", "lang": "en"}
        for n in numbers
        for kind, text in texts.items()
    ]
    write_captions(folder / "captions" / "r" / "part-00000.parquet", rows)
    return folder


@pytest.fixture
def shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Shards of clips 0 to 19, of which those below 10 are pictures, with captions of their own."""
    told = {"short": "own {}", "long": "The long text that clip {} came with."}
    monkeypatch.setattr(
        data_tiny, "captions", lambda n: [{"type": kind, "text": text.format(n)} for kind, text in told.items()]
    )
    frames = [1] * 10 + [9] * 10
    data_tiny.write(tmp_path / "shards", [(fields(16, 16, count, "mp4"), b"x") for count in frames])
    return tmp_path / "shards"


def numbers(found: list[Any]) -> set[int]:
    return {int("".join(letter for letter in pair.short if letter.isdigit())) for pair in found}


def test_examples_are_pairs_of_one_clip_and_of_its_kind(shards: Path, tmp_path: Path) -> None:
    made = write_table(tmp_path / "made", range(20))
    for still in (False, True):
        found, place = draw_examples([str(made)], [str(shards)], count=6, style="long", still=still, seed=0)
        assert place == str(made) and len(found) == 6
        assert numbers(found) <= set(range(10) if still else range(10, 20))
        assert all(pair.long == f"A long text of {pair.short[2:]}, with details." for pair in found)


def test_examples_come_from_the_shards_where_nothing_was_captioned_since(shards: Path, tmp_path: Path) -> None:
    originals = write_table(tmp_path / "made", range(20), model="original")  # not in our captioner's words
    options = {"count": 4, "style": "long", "seed": 0}
    found, place = draw_examples(["nowhere", str(originals)], [str(shards)], still=True, **options)
    assert place == str(shards) and numbers(found) <= set(range(10))
    assert all(pair.long == f"The long text that clip {pair.short[4:]} came with." for pair in found)
    write_table(shards, range(20))  # beside them
    assert draw_examples([], [str(shards)], still=True, **options)[0][0].short.startswith("a clip")


def test_the_seed_alone_chooses_the_examples(shards: Path) -> None:
    def drawn(seed: int) -> list[Any]:
        return draw_examples([], [str(shards)], count=4, style="long", still=False, seed=seed)[0]

    assert drawn(0) == drawn(0) and len({tuple(drawn(seed)) for seed in range(5)}) > 1


def test_what_holds_no_pairs_gives_no_examples(shards: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"count": 4, "still": False, "seed": 0}
    assert draw_examples([], [str(shards)], style="camera", **options) == ([], "")
    (tmp_path / "bad.parquet").write_bytes(b"no table")
    with caplog.at_level(logging.WARNING):
        assert draw_examples([str(tmp_path)], [], style="long", **options) == ([], "")
    for shard in shards.glob("*.tar"):
        shard.write_bytes(b"")
    assert draw_examples([], [str(shards)], style="long", **options) == ([], "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ('a sign that says "OPEN 24 h"', ["OPEN 24 h"]),
        ("ein Schild: „Offen“, ein »Café« und «non»", ["Offen", "Café", "non"]),
        ("牌子上写着「开门」", ["开门"]),
        ("'STOP' in front of the dogs' bowl, don't", ["STOP"]),
        ('“He said ‘no’ twice”, 5" long', ["He said ‘no’ twice"]),
        ("the dogs' bowl isn't here", []),
        ('‘Don’t stop’ and 5" by 6" wide', ["Don’t stop"]),
        ('写着"开门"的牌子', ["开门"]),
        ('"" and " "', []),
    ],
)
def test_quotations_are_found_in_all_kinds_of_marks(text: str, found: list[str]) -> None:
    assert [inner for _, inner, _ in quotes(text)] == found


@pytest.mark.parametrize(
    ("prompt", "reply", "found"),
    [
        ("a cat", Reply("A grey cat sits.", "stop"), ("A grey cat sits.", "")),
        (
            "a cat",
            Reply('Sure! Here is the expanded prompt:\n\n"A **grey** cat sits."', "stop"),
            ("A grey cat sits.", ""),
        ),
        ("a cat", Reply("Caption: A grey\ncat\tsits.\x07", ""), ("A grey cat sits.", "")),
        ("a cat", Reply(" \n", "stop"), ("", "empty")),
        ("a cat", Reply("…", "stop"), ("", "empty")),
        ("a cat", Reply("", "refusal"), ("", "refused")),
        ("a cat", Reply("I’m sorry, but I can’t help with that.", "stop"), ("", "refused")),
        ("a cat", Reply("As a large language model, I draw no cats.", "stop"), ("", "refused")),
        ("a cat", Reply("我不能写这个", "stop"), ("", "refused")),
        ("a cat", Reply("Sorry-looking cats sit in a row.", "stop"), ("Sorry-looking cats sit in a row.", "")),
        ("a sorry cat", Reply("A cat that looks sorry.", "stop"), ("A cat that looks sorry.", "")),
        ("a cat", Reply("A grey cat that", "length"), ("", "cut off")),
        ("a cat", Reply("A cat, a cat, a cat, a cat, a cat.", "stop"), ("", "repeated itself")),
        ("a cat", Reply(" ".join(map(str, range(3000))), "stop"), ("", "too long")),
        ("a cat", Reply("ab" * 8_000_000, "stop"), ("", "too long")),
        ("a long prompt about a cat and a dog", Reply("A cat.", "stop"), ("", "too short")),
        ('it says "Hi  you"', Reply('A sign says "Hi  you".', "stop"), ('A sign says "Hi  you".', "")),
        ('it says "می\u200cخواهم"', Reply("“می\u200cخواهم”, it says.\x07", ""), ('"می\u200cخواهم", it says.', "")),
        ('it says "Hi"', Reply("A sign says “Hi”.", "stop"), ('A sign says "Hi".', "")),
        ('it says "Hi"', Reply('A 6 foot" sign says "Hi".', "stop"), ('A 6 foot" sign says "Hi".', "")),
        ('it says "**Hi**"', Reply('A sign says "**Hi**".', "stop"), ('A sign says "**Hi**".', "")),
        ("a cat", Reply('"Caption: A grey cat sits."', "stop"), ("A grey cat sits.", "")),
        ('it says "Hi"', Reply('A sign says "HI".', "stop"), ("", 'lost "Hi"')),
        ('it says "Hi"', Reply("A sign says Hi.", "stop"), ("", 'lost "Hi"')),
    ],
)
def test_a_reply_is_a_caption_or_it_is_said_why_not(prompt: str, reply: Reply, found: tuple[str, str]) -> None:
    assert caption_of(prompt, reply) == found


def test_the_model_is_shown_examples_and_told_what_to_repeat(host: ChatHost, shards: Path, tmp_path: Path) -> None:
    host.answer = lambda body: 'A cat beside a sign that says "Hi".'
    expansion(host, shards=str(shards), examples=2)(moving('a cat, "Hi"'), tmp_path)
    (asked,) = host.asked
    assert [turn["role"] for turn in asked["messages"]] == ["user", "assistant"] * 2 + ["user"]
    first, long, *_, last = (turn["content"] for turn in asked["messages"])
    assert "video clips" in first and first.rpartition("\n\n")[2].startswith("own 1")
    assert long.startswith("The long text that clip 1")
    assert last == 'a cat, "Hi"\n(To be repeated letter by letter: "Hi")'
    assert asked["top_p"] == 0.9 and asked["temperature"] == 0.7 and asked["max_tokens"] == 300


def test_a_longer_prompt_is_kept_and_asked_for_once(host: ChatHost, tmp_path: Path) -> None:
    wishes = moving("a red circle", "a blue circle", "a red circle", "")
    found = expansion(host)(wishes, tmp_path)
    assert {wish: longer.text for wish, longer in found.items()} == dict.fromkeys(wishes[:2], LONG)
    assert len(host.asked) == 2
    assert found[wishes[0]].by == {"engine": "openai", "model": "tiny", "seed": 0}
    host.always = 500
    assert expansion(host)(wishes, tmp_path) == found and len(host.asked) == 2
    rows = [json.loads(line) for line in (tmp_path / NAME).read_text().splitlines()]
    assert {row["prompt"] for row in rows} == {"a red circle", "a blue circle"}


@pytest.mark.parametrize("other", [{"seed": 1}, {"temperature": 0.0}, {"extra": {"top_k": 3}}, {"instruction": "hm"}])
def test_whatever_changes_a_text_makes_it_anew(host: ChatHost, tmp_path: Path, other: dict[str, Any]) -> None:
    for options in ({}, other, {}):
        expansion(host, **options)(moving("a cat"), tmp_path)
    assert len(host.asked) == 2


def test_a_line_that_was_cut_short_costs_only_itself(host: ChatHost, tmp_path: Path) -> None:
    expansion(host)(moving("a cat", "a dog"), tmp_path)
    file = tmp_path / NAME
    other = json.dumps(json.loads(file.read_text().splitlines()[0]) | {"expanded": None}).encode()
    file.write_bytes(file.read_bytes()[:-9] + b"\n" + other)  # and one that somebody has spoilt
    for _ in range(2):
        found = expansion(host)(moving("a cat", "a dog"), tmp_path)
        assert {longer.text for longer in found.values()} == {LONG}
    assert len(host.asked) == 3


def test_a_reply_that_is_no_caption_is_asked_for_again_with_another_draw(host: ChatHost, tmp_path: Path) -> None:
    said = iter(["", "I cannot do that.", LONG])
    host.answer = lambda body: next(said)
    found = expansion(host, temperature=0.0)(moving("a cat"), tmp_path)
    assert found[("a cat", False)].text == LONG
    assert [asked["temperature"] for asked in host.asked] == [0.0, 0.7, 0.7]
    assert len({asked["seed"] for asked in host.asked}) == 3


def test_prompts_without_a_caption_are_drawn_as_they_are_and_it_is_said(
    host: ChatHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    host.answer = lambda body: LONG if "cat" in body["messages"][-1]["content"] else "I cannot."
    with caplog.at_level(logging.INFO):
        found = expansion(host, attempts=2)(moving("a cat", "a dog", 'a "cow"'), tmp_path)
    assert list(found) == moving("a cat") and len(host.asked) == 5
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert said == "expand=openai: 2 of 3 prompts are drawn as they are, such as 'a dog': refused"


@pytest.mark.parametrize("fault", [500, "reset", "nonsense", 2.0])
def test_a_server_that_fails_leaves_the_prompts_and_is_not_asked_for_long(
    host: ChatHost, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: Any
) -> None:
    host.always = fault
    prompts = moving(*(f"prompt {number}" for number in range(40)))
    assert expansion(host, timeout_s=0.1, concurrency=2)(prompts, tmp_path) == {}
    assert len(host.asked) < 24
    said = [record.getMessage() for record in caplog.records if "drawn as they are" in record.getMessage()]
    assert len(said) == 1 and "40 of 40 prompts" in said[0] and host.url in said[0] and "\n" not in said[0]


def test_an_absent_server_leaves_the_prompts_and_what_the_user_must_mend_stops(tmp_path: Path) -> None:
    with chatting() as host:
        with pytest.raises(ChatError, match="no model 'other'"):
            OpenAIExpansion(url=host.url, model="other")(moving("a cat"), tmp_path)
        url = host.url
    assert OpenAIExpansion(url=url, model="tiny")(moving("a cat"), tmp_path) == {}
    with pytest.raises(ConfigError, match="expand=openai: url='localhost:8000'"):
        OpenAIExpansion(url="localhost:8000", model="tiny")
    for name, value in (("examples", -1), ("attempts", 0), ("max_tokens", 0), ("temperature", -0.1), ("top_p", 0.0)):
        with pytest.raises(ConfigError, match=f"expand.{name}={value}"):
            OpenAIExpansion(url=url, model="tiny", **{name: value})  # type: ignore[arg-type]


def test_each_prompt_gets_its_own_reply_however_late(host: ChatHost, tmp_path: Path) -> None:
    draw = random.Random(1)
    host.answer = lambda body: "The longer form of " + body["messages"][-1]["content"].rpartition("\n\n")[2]
    host.delay = lambda body: draw.random() * 0.03
    prompts = moving(*(f"prompt {number}" for number in range(40)))
    found = expansion(host)(prompts, tmp_path)
    assert {prompt: longer.text for (prompt, _), longer in found.items()} == {
        prompt: f"The longer form of {prompt}" for prompt, _ in prompts
    }


def test_without_examples_the_model_is_told_what_a_caption_says(
    host: ChatHost, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        expansion(host, captions="nowhere")([("a cat", True)], tmp_path)
    (turn,) = host.asked[0]["messages"]
    assert "plain sentences" in turn["content"] and "pictures" in turn["content"]
    assert "no clip of nowhere has both a short and a long caption" in caplog.text
