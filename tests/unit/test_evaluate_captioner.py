"""Promises of stage=evaluate target=captioner: the truth scores full marks, guessing does not, nothing is hidden."""

from __future__ import annotations

import logging
from collections.abc import Callable

import data_tiny
import pytest
from rich.console import Console
from told_captions import CLIPS, STYLES, Finder, Reader, Teller, job, page_of, report_of, tiny
from torch import nn

from data_prep.world import Scene, World, describe
from soratrain.compose import compose
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.run import prepare
from soratrain.stages import evaluate_captioner as stage
from soratrain.stages import evaluate_captioner_scores as scores
from soratrain.stages.evaluate_captioner_clips import true_captions
from soratrain.stages.evaluate_captioner_shown import show
from soratrain.stages.evaluate_captioner_text import can_score


@pytest.fixture
def tells(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Teller]:
    """Puts a Teller in the place of the weights."""

    def put(tell: Callable[[Scene, str], str], kind: type[Teller] = Finder) -> Teller:
        net = kind(tell)
        monkeypatch.setattr(
            weights, "load", lambda folder, name, *_: ({"captioner": net, "text": Reader(net)}[name], {})
        )
        return net

    return put


def test_a_captioner_that_says_the_truth_reaches_the_ceiling(tmp_path, tells, capsys):
    tells(describe)
    result = job(tmp_path)()
    report = report_of(tmp_path)
    assert [item["name"] for item in report["sets"]] == ["seen", "heldout"]
    for item in report["sets"]:
        assert item["clips"] == CLIPS
        for style, found in item["styles"].items():
            assert found["world"]["ours"] == found["world"]["true"] and found["world"]["ours"]["invented"] == 0
            assert {found["world"]["ours"][name] for name in ("color", "shape", "number", "motion")} == {1.0}
            assert found["world"]["ours"]["size"] == found["world"]["ours"]["camera"] == float(style == "long")
            assert found["language"] == found["true"] and found["language"]["empty"] == 0
            assert item["recall"][style]["video_to_text"] == {"at_1": 1.0, "at_5": 1.0, "at_10": 1.0}
            assert item["recall"][style]["chance"]["at_1"] == pytest.approx(1 / item["recall"][style]["clips"])
            if can_score():
                assert [found["scores"][name] for name in ("bleu_4", "rouge_l")] == pytest.approx([1.0, 1.0])
                assert found["scores"]["cider_d"] == pytest.approx(10.0)
                assert found["another"]["bleu_4"] < 0.9 and found["another"]["cider_d"] < 9
    assert result["color"] == result["motion"] == result["recall_video_to_text"] == 1.0 and result["clips"] == 2 * CLIPS
    page = page_of(tmp_path)
    assert page.marks == ["marked"]  # that of the legend
    assert (page.cards, page.videos + page.images) == (8, 8) and page.videos > 4
    assert "shape · held out, long" in page.text and f"@1 of {CLIPS} · held out, long" in page.text
    said = capsys.readouterr().out
    assert "100" in said and said.splitlines()[-1] == "the last line's figures: held out, long; its clips: of all sets"


def test_what_a_style_does_not_speak_of_has_no_figure(tmp_path, tells):
    tells(describe)
    result = job(tmp_path, styles=["short"])()
    assert "motion · held out, short" in page_of(tmp_path).text
    assert result["motion"] == 1.0 and not {"size", "camera"} & set(result) and result["invented"] == 0


def test_what_is_said_wrongly_is_counted_and_marked(tmp_path, tells, capsys):
    swapped = {"red": "blue", "blue": "red"}
    color = lambda scene: scene.truth.objects[0].color  # noqa: E731
    tells(
        lambda scene, style: describe(scene, style).replace(
            f" {color(scene)} ", f" {swapped.get(color(scene), color(scene))} "
        )
    )
    job(tmp_path, shown=2 * CLIPS)()
    wrong = 0
    for item in report_of(tmp_path)["sets"]:
        share = sum(color(World("demo").scene(i, item["name"])) in swapped for i in range(CLIPS)) / CLIPS
        wrong += round(share * CLIPS)
        for found in item["styles"].values():
            assert found["world"]["ours"]["color"] == pytest.approx(1 - share)
            assert found["world"]["ours"]["invented"] == pytest.approx(share)
            assert found["world"]["ours"]["shape"] == 1.0 and found["world"]["true"]["color"] == 1.0
    assert wrong
    page = page_of(tmp_path)
    assert page.bad == wrong
    assert page.marks.count("red") + page.marks.count("blue") == 2 * wrong and len(page.marks) == 1 + 2 * wrong
    assert "invented" in capsys.readouterr().out


def test_the_worst_clips_are_shown_beside_those_drawn_by_lot(tmp_path, tells):
    bad = World("demo").scene(CLIPS - 1, "seen").wording
    tells(lambda scene, style: "" if scene.wording == bad else describe(scene, style))
    job(tmp_path, shown=2)()
    page = page_of(tmp_path)
    assert page.text.count("(nothing)") == 2 and page.marks == ["marked"] and page.bad == 0  # it contradicts nothing
    assert f"seen/{CLIPS - 1}" in page.text and "among the worst" in page.text
    empty = report_of(tmp_path)["sets"][0]["styles"]["long"]["language"]["empty"]
    assert empty == pytest.approx(1 / CLIPS)


def test_a_clip_that_is_taken_for_another_finds_the_wrong_caption(tmp_path, tells):
    tells(describe).confused = 1
    result = job(tmp_path)()
    assert result["recall_video_to_text"] < 0.2 and result["recall_text_to_video"] < 0.2


def test_without_a_contrastive_head_recall_is_left_out_and_that_is_said(tmp_path, tells, capsys, monkeypatch):
    net = tells(describe, Teller)
    result = job(tmp_path)()
    assert "recall_video_to_text" not in result and report_of(tmp_path)["sets"][0]["recall"] == {}
    assert "recall is left out: Teller has no contrastive head" in " ".join(capsys.readouterr().out.split())

    def load(folder, name, *_):
        if name == "text":
            raise DataError("no weights of 'text'")
        return net, {}

    monkeypatch.setattr(weights, "load", load)
    monkeypatch.setattr(Teller, "embed_video", Finder.embed_video, raising=False)
    monkeypatch.setattr(Teller, "embed_text", Finder.embed_text, raising=False)
    job(tmp_path)()
    assert "no text encoder" in page_of(tmp_path).text


def test_without_the_library_of_text_scores_the_rest_is_measured_and_that_is_said(tmp_path, tells, caplog, monkeypatch):
    tells(describe)
    for module in (stage, scores):
        monkeypatch.setattr(module, "can_score", lambda: False)
    with caplog.at_level(logging.WARNING):
        result = job(tmp_path)()
    assert "pip install 'soratrain[captions]'" in caplog.text and "bleu_4" not in result and result["color"] == 1.0
    assert "soratrain[captions]" in page_of(tmp_path).text


def test_any_shards_with_captions_are_measured(tmp_path, capsys):
    shapes = [(16, 16, 5), (16, 32, 9), (16, 16, 1), (32, 16, 5), (16, 16, 5), (16, 16, 1)]
    shards = data_tiny.write_clips(tmp_path / "shards", shapes)
    result = job(tiny(tmp_path), shards=str(shards), clips=4)()
    (item,) = report_of(tmp_path)["sets"]  # they are not of the world, so no scenes of it are drawn
    assert item["name"] == "shards" and item["clips"] == 4 and result["clips"] == 4
    assert all(item["styles"][style]["compared"] == 4 for style in STYLES)
    assert item["styles"]["long"]["world"] is None and 0 <= result["recall_video_to_text"] <= 1
    assert page_of(tmp_path).cards == 4
    both = job(tmp_path, shards=str(shards), clips=6, world="demo")()
    assert both["clips"] == 6 + 12 and [item["name"] for item in report_of(tmp_path)["sets"]][1:] == ["seen", "heldout"]


def test_clips_without_captions_are_left_out_and_none_at_all_is_an_error(tmp_path, monkeypatch):
    said = data_tiny.captions
    monkeypatch.setattr(data_tiny, "captions", lambda number: said(number) if number % 2 else [])
    shards = data_tiny.write_clips(tmp_path / "some", [(16, 16, 5)] * 6)
    job(tiny(tmp_path), shards=str(shards))()
    (item,) = report_of(tmp_path)["sets"]
    assert item["clips"] == 3 and item["left_out"] == {"without a caption": 3}
    monkeypatch.setattr(data_tiny, "captions", lambda number: [])
    shards = data_tiny.write_clips(tmp_path / "none", [(16, 16, 5)] * 2)
    with pytest.raises(DataError, match=r"no clip has a caption.*\(2 × without a caption\); give shards with captions"):
        job(tmp_path, shards=str(shards))()


def test_originals_count_as_short_or_long_by_their_length():
    captions = (("gt", "a disc"), ("gt", "a disc that is red and moves"), ("long", "x"))
    assert true_captions(captions, "short", 20) == ["a disc"]
    assert true_captions(captions, "long", 20) == ["a disc that is red and moves", "x"]
    assert true_captions(captions, "camera", 20) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"styles": ["tags"]}, r"was trained on the styles \['short', 'long'\], not on \['tags'\]"),
        ({"styles": []}, "asks for no captions"),
        ({"world": "big"}, "stage.job.world=big: no such preset; use demo, full, auto or null"),
        ({"world": None}, "nothing is left to evaluate on"),
        ({"clips": 0}, "stage.job.clips=0 must be at least 1"),
        ({"pool": 1}, "stage.job.pool=1 must be at least 2"),
    ],
)
def test_a_wrong_setting_is_named_with_the_mend(tmp_path, changes, said):
    with pytest.raises(ConfigError, match=said):
        job(tiny(tmp_path), **changes)()


def test_a_captioner_that_was_taught_nothing_and_a_net_that_is_none_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"trained on the styles \[\]"):
        job(tiny(tmp_path, styles=()))()
    monkeypatch.setattr(weights, "load", lambda *_: (nn.Linear(1, 1), {}))
    with pytest.raises(ConfigError, match="holds a Linear; give a captioner's folder"):
        job(tmp_path)()


def test_a_caption_is_text_and_never_markup(tmp_path, tells):
    tells(lambda scene, style: f"<script>alert('{style}')</script> & a blue [bold]circle")
    job(tmp_path, shown=1)()
    page = page_of(tmp_path)
    assert "<script>alert('long')</script> & a" in page.text and "[bold]" in page.text


def test_the_tables_fit_a_narrow_terminal(tmp_path, tells):
    tells(describe)
    job(tmp_path)()
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(console, report_of(tmp_path))
    said = console.export_text()
    assert max(map(len, said.splitlines())) <= 80 and "…" not in said and "held out, long" in said


def test_the_target_has_a_folder_of_its_own_and_shards_may_be_none():
    config, _ = prepare(["stage=evaluate", "target=captioner", "machine=laptop"])
    assert config["out"] == "outputs/default/evaluate/captioner" and config["stage"]["needs"] == ["captioner", "shards"]
    assert prepare(["stage=evaluate", "target=captioner", "machine=laptop", "inputs.shards=null"])[0]
    assert compose(["stage=evaluate", "target=captioner", "stage.job.world=full"])[0]["stage"]["job"]["world"] == "full"
