"""What is measured of captions as texts, and who finds whom."""

from __future__ import annotations

import pytest
import torch
from told_captions import Finder, Reader, needs_scores
from torch import nn
from torchmetrics.functional.text import bleu_score

from data_prep.world import World, describe
from soratrain.stages import evaluate_captioner_scores as scores
from soratrain.stages.evaluate_captioner_text import can_score, language, pool_of, recall, text_scores, words


@needs_scores
def test_text_scores_are_those_of_the_field():
    written = ["a red circle moves to the left", "the blue star does not move on a white ground", ""]
    true = [["a red circle moves left", "a red disc moves to the left"], ["a blue star stands still"], ["a cross"]]
    found = text_scores(written, true)
    assert found["bleu_4"] == pytest.approx(float(bleu_score(written, true, n_gram=4)), abs=1e-4)
    # ROUGE-L by hand: the best precision and the best recall of a clip's captions, beta 1.2
    pairs = [(6 / 7, 5 / 5), (2 / 10, 2 / 5)]
    rouge = [(1 + 1.44) * p * r / (r + 1.44 * p) for p, r in pairs]
    assert found["rouge_l"] == pytest.approx(sum(rouge) / 3)
    assert found["cider_d"] is not None and 0 < found["cider_d"] < 10
    assert text_scores(written[:1], true[:1])["cider_d"] is None
    assert text_scores(["A Red circle, moves left!"], [["a red circle moves left"]])["bleu_4"] == pytest.approx(1.0)
    assert text_scores(["a zebra"], [["a " + "very " * 100 + "long caption"]])["bleu_4"] == 0.0  # not 1e-30


def test_words_are_cut_without_case_and_marks_and_ideographs_one_by_one():
    assert words("A well-lit café, isn't it?") == ["a", "well-lit", "café", "isn't", "it"]
    assert words("三只猫 sit") == ["三", "只", "猫", "sit"]
    assert words("नमस्ते, दुनिया। สวัสดี cafe\u0301") == ["नमस्ते", "दुनिया", "สวัสดี", "café"]


def test_a_true_caption_without_a_word_is_nothing_to_compare_with():
    said = [scores.Told(true, (("long", true),), None, {"long": ""}) for true in ("…", "a disc")]
    found = scores.measure(said, ["long"], 100, 64, None, None)["styles"]["long"]
    assert found["asked"] == 2 and found["compared"] == 1
    assert not can_score() or found["scores"]["rouge_l"] == 0.0


def test_language_is_counted():
    found = language(["a b c d a b c d", "A b.", "", "a b"])
    assert found["words"] == pytest.approx(4.0) and found["longest"] == 8 and found["vocabulary"] == 4
    assert found["repeated"] == pytest.approx((1 - 4 / 5) / 3) and found["empty"] == 0.25
    assert found["type_token"] == pytest.approx(4 / 12) and found["distinct"] == 0.75
    assert language([])["words"] == 0


def test_a_pool_holds_each_caption_once():
    said = [tuple(words(text)) for text in ("a disc", "A disc.", "", "a box", "a cross")]
    assert pool_of(said, 64) == [0, 3, 4] and pool_of(said, 2) == [0, 3]


def test_a_paraphrase_is_no_other_caption_where_it_is_known_what_it_means():
    truth = World("demo").scene(0, "seen").truth
    texts = ("a red circle rises on a black background", "on a black background, a red circle moves up", "a blue cross")
    pairs = [(scores.Told(text, (), truth, {}, torch.eye(3)[n]), [text]) for n, text in enumerate(texts)]
    net = Finder(describe)
    reader = Reader(net)
    reader.row, reader.size = {text: n for n, text in enumerate(texts)}, 3
    assert scores.found_again(pairs, 64, net, reader)["clips"] == 2
    unknown = [(scores.Told(one.name, (), None, {}, one.vector), true) for one, true in pairs]
    assert scores.found_again(unknown, 64, net, reader)["clips"] == 3


def test_recall_counts_ties_and_what_is_no_number_as_misses():
    own = torch.eye(12)
    assert recall(own, own)["video_to_text"] == {"at_1": 1.0, "at_5": 1.0, "at_10": 1.0}
    assert recall(own, own.roll(1, 0))["text_to_video"]["at_1"] == 0.0
    same = torch.ones(12, 3)
    assert recall(same, same)["video_to_text"] == {"at_1": 0.0, "at_5": 0.0, "at_10": 0.0}
    broken = own.clone()
    broken[0] = torch.nan
    found = recall(broken, own)
    assert found["video_to_text"]["at_10"] == pytest.approx(11 / 12) and found["clips"] == 12
    torch.manual_seed(0)
    for clips, size in ((5, 512), (9, 32), (64, 128)):  # products of whole matrices round equal rows differently
        one = nn.functional.normalize(torch.randn(1, size), dim=1).repeat(clips, 1)
        other = nn.functional.normalize(torch.randn(clips, size), dim=1)
        assert recall(other, one)["video_to_text"]["at_1"] == recall(one, other)["text_to_video"]["at_1"] == 0.0
    near = own.clone()
    near[0, 1] = 2.0  # clip 0 takes caption 1 for its own, then its own
    assert recall(near, own)["video_to_text"] == {"at_1": pytest.approx(11 / 12), "at_5": 1.0, "at_10": 1.0}
