"""What counts as a caption: nothing empty, repeated, declined or broken off, and nothing but text."""

from __future__ import annotations

import time

import pytest

from soratrain.captions.describe import language
from soratrain.captions.engine import Answer
from soratrain.captions.faults import cleaned, fault, original, overlap


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a red disc moves left", None),
        ("三只猫在雪地里玩", None),
        ("it goes on and on", None),
        ("", "empty"),
        (" \n", "empty"),
        ("...", "empty"),
        ("\x00\x07", "empty"),
        ("<think>It is a disc.</think>", "empty"),
        ("a red a red a red disc", "repeated"),
        ("aaaaaaaaaaaaaaaa", "repeated"),
        ("left, left, left, left", "repeated"),
        ("The disc falls to the ground and breaks. " * 3, "repeated"),
    ],
)
def test_empty_and_repeated_captions_are_faults(caption, reason):
    assert fault(Answer(caption)) == reason


@pytest.mark.parametrize(
    "said",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I can’t describe people in images.",
        "I am very sorry but I cannot do this.",
        "Sorry, I can't assist with that request.",
        "I apologize, but I am unable to view videos.",
        "I cannot identify the people in this video.",
        "I can't see any images here.",
        "I'm unable to process video content directly.",
        "I am not able to watch videos.",
        "I'm afraid I cannot describe this.",
        "I don't have the ability to see images.",
        "I won't describe this.",
        "Unfortunately, I cannot see the frames.",
        "Unfortunately, no image was provided.",
        "As an AI language model, I cannot view images.",
        "As a large language model I have no eyes.",
        "As an artificial intelligence, I have no eyes.",
        "Unable to view the image.",
        "There is no video attached to your message.",
        "It seems there are no images attached.",
        "No image was provided.",
        "Please provide the image you would like me to describe.",
        "Could you please upload the video?",
        "抱歉，我无法描述这个视频。",
        "很抱歉，我不能提供帮助",
    ],
)
def test_an_answer_that_declines_is_refused(said):
    assert fault(Answer(said)) == "refused"


@pytest.mark.parametrize(
    "said",
    [
        "A sorry-looking dog cannot reach the ball.",
        "Sorry-looking dogs wait in the rain.",
        "A man says 'I'm sorry, I can't' to a woman.",
        "There is no movement; the camera is static.",
        "There is no video player on the desk, only a lamp.",
        "Please-do-not-touch signs hang on a red wall.",
        "An AI-generated city at night.",
        "As an artist paints, the camera zooms in.",
        "As an artificial moon rises, the sea turns white.",
        "Unfortunately for the cat, the ball rolls away.",
        "I-beams are lifted by a crane.",
        "Able hands knead dough.",
        "No image is in focus as the camera pans left.",
    ],
)
def test_a_description_that_sounds_like_it_is_not(said):
    assert fault(Answer(said)) is None


def test_a_caption_that_did_not_end_is_a_fault_however_it_reads():
    assert fault(Answer("a red disc moves", cut=True)) == "cut_off"
    assert fault(Answer("", cut=True)) == "cut_off"
    assert fault(Answer("", failure="HTTP 400: too large", final=True)) == "refused"


def test_an_endless_caption_is_judged_at_once():
    began = time.process_time()
    assert fault(Answer("a b c d e f g h " * 5000, cut=True)) == "cut_off"
    assert fault(Answer("".join(chr(97 + place * place % 23) for place in range(4000)))) in (None, "repeated")
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("a red\x00 disc\r\n\tmoves\u2028left\x1b[0m", "a red disc moves left [0m"),
        ('"A red disc."', "A red disc."),
        ("“A red disc.”", "A red disc."),
        ("‘A red disc.’", "A red disc."),
        ("„Halt“ und „Los“", "„Halt“ und „Los“"),
        ('"Stop" and "go" signs', '"Stop" and "go" signs'),
        ('A sign says "STOP"', 'A sign says "STOP"'),
        ("<think>hm, a disc\nor two</think>\n\nA red disc.", "A red disc."),
        ("The prompt has opened this thought.\n</think>\n\nA red disc.", "A red disc."),
        ("broken \ud800 letter", "broken letter"),
        ("a zero\u200bwidth, a soft\u00adhyphen", "a zerowidth, a softhyphen"),
        ("می\u200cخواهم 👨\u200d👩\u200d👧", "می\u200cخواهم 👨\u200d👩\u200d👧"),
        ('"', '"'),
        ("三只猫 🐈", "三只猫 🐈"),
    ],
)
def test_what_is_not_text_is_taken_off(said, kept):
    assert cleaned(said) == kept


def test_overlap_counts_shared_words():
    assert overlap("A red disc.", "a red disc") == 1.0
    assert overlap("a red disc", "a blue disc") == pytest.approx(2 / 3)
    assert overlap("red", "blue") == overlap("", "") == 0.0


def test_the_original_of_the_same_style_comes_first_then_the_clips_own_words():
    captions = [{"type": "long", "text": "L"}, {"type": "gt", "text": "G"}, {"type": "short", "text": " \x00"}]
    assert [original(captions, style)["text"] for style in ("long", "short", "camera")] == ["L", "G", "G"]
    assert original([{"type": "long", "text": "L"}], "short")["text"] == "L"
    assert original([], "short") is None


def test_an_answer_in_another_script_is_not_called_english():
    assert language("a red disc", "en") == "en" and language("Crème brûlée, 三 pieces", "en") == "en"
    assert language("三只猫在雪地里玩", "en") == "und" and language("三只猫", "zh") == "zh"
    assert language("123", "en") == "en"
