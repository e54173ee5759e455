"""Promises of captions: from which source, of which type, how often."""

from __future__ import annotations

from collections import Counter

import pytest
from data_tiny import key, write_clips
from loading import SHAPES, video

from soratrain.batch import draw_of
from soratrain.data.captions import CaptionMix, captions_of
from soratrain.data.manifest import write_captions
from soratrain.errors import ConfigError


def test_captions_made_later_replace_those_in_the_shard(clips, tmp_path):
    made = [
        {"key": key(number), "type": "long", "text": f"made {number}", "model": "m", "rev": "r", "lang": "en"}
        for number in range(len(SHAPES))
    ]
    write_captions(tmp_path / "captions" / "r" / "part-00000.parquet", made)
    batches = list(video(clips, captions=str(tmp_path), caption_mix={"synthetic": 1.0}).loader(0, 6))
    for batch in batches:
        assert list(batch.captions) == [f"made {int(name, 16)}" for name in batch.keys]
    batches = list(video(clips, caption_types={"short": 1.0}).loader(0, 6))
    for batch in batches:
        assert list(batch.captions) == [f"short original {int(name, 16)}" for name in batch.keys]
    assert {style for batch in batches for style in batch.styles} == {"short"}


def test_captions_beside_the_shards_are_the_original_ones(tmp_path):
    folder = write_clips(tmp_path, SHAPES)
    rows = [
        {"key": key(number), "type": "gt", "text": f"beside {number}", "model": "", "rev": "", "lang": ""}
        for number in range(0, len(SHAPES), 2)
    ]
    write_captions(folder / "captions" / "gt" / "part-00000.parquet", rows)
    data = video(str(folder), caption_types={"gt": 1.0, "short": 1.0})
    for batch in data.loader(0, 6):
        for name, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption == f"{'short original' if int(name, 16) % 2 else 'beside'} {int(name, 16)}"


@pytest.mark.parametrize(
    "header",
    [{"captions": ["a  dog"]}, {"captions": "a dog"}, {"caption": "a dog"}, {"text": "a dog\n", "caption": None}],
)
def test_plain_strings_of_another_program_are_captions(header):
    assert captions_of(header) == [{"type": "gt", "text": "a dog"}]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"sources": {"synthetic": 0.0, "original": 0.0}}, "data.caption_mix=.*shows no captions at all"),
        ({"types": {"long": 0.0}}, "data.caption_types=.*shows no captions at all"),
        ({"types": {"long": -1.0}}, "data.caption_types.long=-1.0: must not be negative"),
        ({"sources": {"made": 1.0}}, "data.caption_mix.made: no such source"),
    ],
)
def test_weights_that_show_nothing_are_refused(weights, said):
    with pytest.raises(ConfigError, match=said):
        CaptionMix(**weights)


def test_captions_come_as_often_as_their_weights():
    original = [{"type": "short", "text": "os"}, {"type": "tags", "text": "ot"}]
    made = {"k": [{"type": "long", "text": "a"}, {"type": "long", "text": "b"}, {"type": "short", "text": "c"}]}
    mix = CaptionMix(sources={"synthetic": 0.8, "original": 0.2}, types={"long": 3, "short": 1}, made=[made])
    found = Counter(mix.choose("k", original, draw_of(number)).text for number in range(8000))
    assert found["ot"] == 0
    assert {text: found[text] / 8000 for text in "abc"} == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.2}, abs=0.02)
    kept = {"k": [{"type": "long", "text": "a", "model": "original"}, {"type": "short", "text": "c", "model": "ours"}]}
    mixed = CaptionMix(sources={"synthetic": 1.0}, types={"long": 1, "short": 1}, made=[kept])
    shown = {mixed.choose("k", [], draw_of(number)) for number in range(20)}
    assert shown == {("a", "long", "original"), ("c", "short", "synthetic")}  # whose words they are
    assert mix.choose("other", original, 1) == ("os", "short", "original")
    assert mix.choose("other", [], 1) == ("", "", "")
    assert mix.choose("k", original, 17) == mix.choose("k", original, 17)
