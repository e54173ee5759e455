"""Promises of captions.html: which clips it shows, and that any text is shown as the text that it is."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from data_prep.world import World, describe, render
from soratrain.stages.evaluate_captioner_clips import Item, OfWorld, asked_of
from soratrain.stages.evaluate_captioner_gallery import Entry, Gallery
from soratrain.stages.evaluate_captioner_page import card, marked
from soratrain.stages.evaluate_captioner_scores import Told, measure
from soratrain.stages.evaluate_captioner_shown import remarks

SET = SimpleNamespace(name="shards")


def told(name: str, said: str, true: str = "a disc", frames: int = 1) -> tuple[Told, Item]:
    item = Item(name, np.zeros((frames, 8, 8, 3), np.uint8), 8.0, (("short", true),))
    return Told(name, item.captions, None, {"short": said}), item


def shown(order: list[int]) -> list[tuple[str, bool]]:
    gallery = Gallery(4, 100)
    for number in order:
        said = " ".join(["a"] + ["zebra"] * number)  # the higher, the worse
        one, item = told(f"clip {number}", said, frames=1 + 4 * (number % 2))
        gallery.offer(SET, [one], [item])  # type: ignore[arg-type]
    return [(entry.told.name, drawn) for entry, drawn in gallery.of("shards")]


def test_the_lot_does_not_depend_on_the_order_in_which_shapes_come() -> None:
    found = shown(list(range(20)))
    assert shown([*range(1, 20, 2), *range(0, 20, 2)]) == found == shown(list(range(19, -1, -1)))
    drawn = [name for name, by_lot in found if by_lot]
    rest = [f"clip {number}" for number in range(19, -1, -1) if f"clip {number}" not in drawn]
    assert len(drawn) == 2 and [name for name, by_lot in found if not by_lot] == rest[:2]


def test_an_image_is_not_asked_what_its_camera_does_and_counts_in_no_figure_of_it() -> None:
    assert asked_of(["long", "camera"], 1) == ["long"] and asked_of(["long", "camera"], 5) == ["long", "camera"]
    found = []
    for item in OfWorld(World("demo"), "seen", 24):
        scene = World("demo").scene(int(item.name.split("/")[1]), "seen")
        styles = asked_of(["long", "camera"], len(item.frames))
        found.append(Told(item.name, item.captions, item.truth, {style: describe(scene, style) for style in styles}))
    images = sum(len(one.texts) == 1 for one in found)
    styles = measure(found, ["long", "camera"], 100, 64, None, None)["styles"]
    assert 0 < images < 24 and styles["camera"]["asked"] == styles["camera"]["compared"] == 24 - images
    assert styles["camera"]["language"]["empty"] == 0 and styles["long"]["asked"] == 24
    report = {"contrast": "yes", "text_scores": "yes", "remarks": [], "captions_per_s": 1.0, "styles": list(styles)}
    report["sets"] = [{"name": "seen", "clips": 24, "left_out": {}, "styles": styles}]
    assert images > 1 and f"not asked for camera: {images} images, which have none" in list(remarks(report))


@pytest.mark.parametrize(
    ("text", "on_page"),
    [
        ("كرة حمراء (2)", "<p class=true dir=auto>كرة حمراء (2)</p>"),
        ("red \x1b[31m\x00 \u202eturned", "red \ufffd[31m\ufffd \ufffdturned"),
        ("<b>&", "&lt;b&gt;&amp;"),
    ],
)
def test_a_caption_runs_in_its_own_direction_and_steers_nothing(text: str, on_page: str) -> None:
    one, item = told("clip", text, text)
    page = card(Entry(one, item.frames, 8.0, item.frames.shape[:3], 0.0), True, 100)
    assert on_page in page and not set("\x00\x1b\u202e") & set(page)


def test_of_an_unknown_truth_a_word_is_marked_that_no_true_caption_of_any_style_has() -> None:
    true = (("short", "a disc"), ("gt", "a red ring"), ("tags", "snow, dusk"))
    one = Told("x", true, None, {})
    assert marked("a Red disc at dusk", one) == ("a Red disc <mark class=new>at</mark> dusk", True)
    assert marked("a red ring", one) == ("a red ring", False) == marked("a red ring", Told("x", (), None, {}))
    assert marked(" ", one) == ("<span class=soft>(nothing)</span>", False)


def test_a_world_clip_has_no_caption_that_was_not_asked_for() -> None:
    scene = World("demo").scene(0, "seen")
    one = Told("x", (), scene.truth, {})
    frames = render(scene)
    assert card(Entry(one, frames[:1], 8.0, (1, 8, 8), 0.0), True, 100).count("class=said>") == 0
