"""Promises of how captions are held against the truth: what is right counts, what is wrong is marked in its words."""

from __future__ import annotations

from dataclasses import replace

import pytest

from data_prep.world import World, describe, judge, read_caption
from data_prep.world.reading import read_phrases
from data_prep.world.seen import Seen, Thing

CIRCLE = Thing("red", "circle", "left", "small", "plain", ("top", "left"))
STAR = Thing("blue", "star", "still", "large", "striped", ("bottom", "middle"))
ONE = Seen("black", (CIRCLE,), camera="still", pattern="plain")
TWO = Seen("white", (CIRCLE, STAR), camera="pans left", pattern="checkered")


def wrong_words(text: str, truth: Seen) -> list[str]:
    return [text[start:end] for start, end in judge(text, truth).wrong]


@pytest.mark.parametrize("preset", ["demo", "full"])
def test_true_captions_are_right_in_all_that_they_say(preset: str) -> None:
    for index in range(80):
        scene = World(preset).scene(index, ("seen", "heldout")[index % 2])
        for style in ("short", "long"):
            found = judge(describe(scene, style), scene.truth)
            assert not found.wrong and not found.invented and found.named == scene.truth.number
            fully = ("color", "shape", "number", "motion", "background")
            judged = found.scores if style == "long" else {n: found.scores[n] for n in fully if n in found.scores}
            assert set(judged.values()) == {1.0}


def test_every_attribute_that_is_wrong_costs_itself_alone_and_is_marked() -> None:
    right = (
        "A small red circle moves left on a black background. It starts at the top left, and the camera does not move."
    )
    assert set(judge(right, ONE).scores.values()) == {1.0}
    for name, words, said in (
        ("motion", "moves left", "rises"),
        ("size", "small", "large"),
        ("background", "black", "white"),
        ("place", "top left", "bottom right"),
        ("camera", "the camera does not move", "the camera pans left"),
        ("texture", "small red", "small striped red"),
    ):
        text = right.replace(words, said)
        found = judge(text, ONE)
        assert {key for key, score in found.scores.items() if score < 1} == {name}
        (marked,) = wrong_words(text, ONE)
        assert marked in said and found.invented == 0


def test_an_object_that_is_not_there_is_invented() -> None:
    blue = judge("a blue circle moves left on a black background", ONE)
    assert (blue.named, blue.invented, blue.scores["color"], blue.scores["shape"]) == (1, 1, 0.0, 1.0)
    assert wrong_words("a blue circle moves left", ONE) == ["blue"]
    more = "a red circle moves left and a green star stands still on a black background"
    found = judge(more, ONE)
    assert (found.named, found.invented, found.scores["number"], found.scores["color"]) == (2, 1, 0.0, 1.0)
    assert wrong_words(more, ONE) == ["green", "star", "stands still"]


def test_an_object_of_the_same_name_is_another_one_where_an_article_brings_it_in() -> None:
    twice = "a red circle moves left and a red circle rises on a black background"
    found = judge(twice, ONE)
    assert (found.named, found.invented, found.scores["number"], found.scores["color"]) == (2, 1, 0.0, 1.0)
    assert wrong_words(twice, ONE) == ["red", "circle", "rises"]
    same = "A red circle moves left. There is one object: the red circle starts at the top left"
    assert judge(same, ONE).named == 1 and judge(same, ONE).scores["place"] == 1.0


def test_an_object_that_is_left_out_costs_its_share() -> None:
    found = judge("a red circle moves left on a white background", TWO)
    assert (found.scores["color"], found.scores["motion"], found.scores["number"]) == (0.5, 0.5, 0.0)
    assert found.invented == 0 and not found.wrong


def test_objects_are_matched_by_what_they_are_and_not_by_their_order() -> None:
    found = judge("a large striped blue star stands still and a small red circle moves left", TWO)
    assert {found.scores[name] for name in ("color", "shape", "size", "texture", "motion", "number")} == {1.0}
    swapped = judge("a blue star moves left and a red circle stands still", TWO)
    assert (swapped.scores["color"], swapped.scores["motion"], swapped.invented) == (1.0, 0.0, 0)


def test_a_number_in_words_must_be_right_too() -> None:
    both = (
        "A red circle moves left, a blue star stands still. There are {} objects: the red circle starts in the middle"
    )
    assert judge(both.format("two"), TWO).scores["number"] == 1.0
    assert judge(both.format("three"), TWO).scores["number"] == 0.0
    assert "three" in wrong_words(both.format("three"), TWO)


def test_an_image_has_no_motion_that_could_be_right() -> None:
    image = replace(ONE, objects=(replace(CIRCLE, motion=None),), camera=None)
    found = judge("a red circle moves left on a black background", image)
    assert "motion" not in found.scores and wrong_words("a red circle moves left", image) == ["moves left"]
    assert wrong_words("a red circle stands still; the camera is fixed", image) == []
    assert wrong_words("a red circle; the camera pans left", image) == ["pans left"]


@pytest.mark.parametrize("text", ["", "three cats sleep", "三只猫", "red red red", "\0" * 9])
def test_what_says_nothing_of_the_clip_is_wrong_and_invents_nothing(text: str) -> None:
    found = judge(text, ONE)
    assert found.scores["shape"] == 0.0 and found.scores["motion"] == 0.0 and found.invented == 0


def test_phrases_stand_where_their_words_are() -> None:
    text = "On  a checkered WHITE background, a red circle\nmoves left, then turns up; the camera zooms in"
    plain = " ".join(text.split())
    found = {phrase.name: (phrase.value, plain[phrase.start : phrase.end]) for phrase in read_phrases(text)}
    assert found == {
        "pattern": ("checkered", "checkered"),
        "background": ("white", "WHITE"),
        "color": ("red", "red"),
        "shape": ("circle", "circle"),
        "motion": ("left, up", "moves left, then turns up"),
        "camera": ("zooms in", "zooms in"),
    }
    assert read_caption(text).objects == (Thing("red", "circle", "left, up"),)
