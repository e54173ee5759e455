"""Who describes clips is a group of the config, and what a captioner is asked are values of it."""

from __future__ import annotations

import pytest

from soratrain import upstream
from soratrain.captions.hf import HFEngine
from soratrain.captions.native import NativeEngine
from soratrain.captions.openai import OpenAIEngine
from soratrain.compose import TEXT_KEYS, compose
from soratrain.errors import ConfigError
from soratrain.outputs import differences
from soratrain.quoting import quote
from soratrain.rules import validate
from soratrain.run import instantiate

WORDS = ["stage=recaption", "machine=laptop"]


def config(*words: str) -> dict:
    found = compose(quote([*WORDS, *words], TEXT_KEYS))[0]
    validate(found)
    return found


def test_each_engine_is_built_and_only_ours_needs_our_captioner():
    made = {}
    for name, more in (("native", []), ("hf", ["engine.folder=some/model"]), ("openai", [])):
        found = config(f"engine={name}", *more)
        made[type(instantiate(found["stage"]["job"]).engine)] = [key for key, _ in upstream.needed(found)]
    assert made == {NativeEngine: ["shards", "captioner"], HFEngine: ["shards"], OpenAIEngine: ["shards"]}


def test_what_is_asked_can_be_said_on_the_command_line():
    long = 'Say, "in one word", what (it) is: 三只猫'
    found = config("engine=openai", f"stage.job.prompts.long={long}", "+stage.job.prompts.mood=The mood, please.")
    prompts = instantiate(found["stage"]["job"]).prompts
    extra = config("engine=openai", "engine.extra={max_tokens: null, max_completion_tokens: 300}")["engine"]["extra"]
    assert extra == {"max_tokens": None, "max_completion_tokens": 300}
    assert prompts["long"] == long and list(prompts) == ["short", "long", "camera", "tags", "mood"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("engine=opnai", "did you mean 'openai'"),
        ("engine=hf", "engine.folder: has no value"),
        ("engine=openai engine.tiemout_s=3", "did you mean 'timeout_s'"),
        ("engine.concurrency=3", "engine.concurrency: no such key"),
        ("engine=hf engine.folder=a engine.max_frames=many", "must be a whole number"),
    ],
)
def test_a_mistyped_engine_is_an_error_with_the_mend(words, said):
    with pytest.raises(ConfigError, match=said):
        config(*words.split())


def test_a_job_may_go_on_at_another_server_and_not_with_another_model():
    before = config("engine=openai", "engine.model=a")
    elsewhere = ["engine.url=http://gpu7:9000/v1", "engine.concurrency=64", "engine.retries=9", "engine.timeout_s=5"]
    assert not differences(before, config("engine=openai", "engine.model=a", *elsewhere, "stage.job.max_bad=0.5"))
    (changed,) = differences(before, config("engine=openai", "engine.model=b"))
    assert changed.startswith("stage.job.engine.model")


@pytest.mark.parametrize("words", ["engine=native", "engine=hf engine.folder=a", "engine=openai"])
def test_a_job_may_go_on_in_smaller_batches(words):
    smaller = ["engine.batch_size=1", *(["engine.pixels_per_batch=99999"] if words == "engine=native" else [])]
    assert not differences(config(*words.split()), config(*words.split(), *smaller))


def test_captions_made_on_the_way_are_by_the_same_engine():
    words = [*WORDS, "engine=openai", "engine.url=http://gpu7:9000"]
    made = upstream.command("captions", "", config("engine=openai"), words)
    assert made[4:] == ["machine=laptop", "engine=openai", "engine.url=http://gpu7:9000"]
