"""Any text passes from the command line through Hydra's grammar unchanged."""

from __future__ import annotations

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from soratrain.quoting import quote

TOKYO = (
    "A stylish woman walks down a Tokyo street filled with warm glowing neon and animated city signage. She wears a"
    " black leather jacket, a long red dress, and black boots, and carries a black purse. She wears sunglasses and"
    " red lipstick. She walks confidently and casually. The street is damp and reflective, creating a mirror effect"
    " of the colorful lights. Many pedestrians walk about."
)
TEXTS = [
    TOKYO,
    "café",
    "三只猫",
    "قطة حمراء",
    "emoji 🎬, and (parentheses) [brackets] {braces}",
    'she said "hello, world"',
    "it's a dog's life",
    "a=b, c: d; e|f & g",
    'back\\slash and \\" escaped quote',
    "ends with a backslash\\",
    "costs ${money} and $5 and \\${x}",
    "  spaces around  ",
    "two\nlines",
    "",
    "null",
    "-m",
    "%d {1..2} *?",
]


def parsed(argument: str) -> str:
    value = OverridesParser.create().parse_override(argument).value()
    return OmegaConf.create({"value": value}).value


@pytest.mark.parametrize("text", TEXTS)
def test_any_text_survives_hydras_grammar(text):
    assert parsed(quote([f"prompt={text}"], ["prompt"])[0]) == text


@pytest.mark.parametrize("text", TEXTS)
def test_quoting_twice_changes_nothing(text):
    once = quote([f"prompt={text}"], ["prompt"])
    assert quote(once, ["prompt"]) == once


def test_only_the_named_keys_are_quoted_and_null_stays_null():
    argv = ["-m", "stage=dit", "optimizer.lr=1e-4,3e-4", "inputs.shards=a b", "+inputs.vae=c,d", "inputs.captions=null"]
    assert quote(argv, ["prompt", "inputs.*"]) == [
        "-m",
        "stage=dit",
        "optimizer.lr=1e-4,3e-4",
        'inputs.shards="a b"',
        '+inputs.vae="c,d"',
        "inputs.captions=null",
    ]


def test_paths_of_every_input_of_a_task_may_hold_anything():
    from soratrain.compose import LIST_KEYS, TEXT_KEYS, compose

    path = "my clips/café, 三 (2).mp4"
    for task, keys in (("animate", ["image"]), ("connect", ["video", "video2"]), ("inpaint", ["video", "mask"])):
        words = [f"task.{key}={path}" for key in keys] + [f"prompts_file={path}"]
        config, _ = compose(quote(["stage=sample", f"task={task}", *words, "machine=laptop"], TEXT_KEYS, LIST_KEYS))
        assert {config["task"][key] for key in keys} == {config["prompts_file"]} == {path}
