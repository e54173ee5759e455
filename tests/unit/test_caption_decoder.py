"""Promises of the captioner's decoder: cached equals uncached, a caption ends by itself, circles are noticed."""

from __future__ import annotations

import pytest
import torch
from captioner_tiny import captioner, clips

from soratrain.errors import ConfigError
from soratrain.models import few_rows
from soratrain.models.caption_decoder import (
    END,
    START,
    Cache,
    Decoder,
    decode_caption,
    encode_captions,
)
from soratrain.models.writing import choose, circles, clean


@pytest.mark.parametrize("least", [1, few_rows.LEAST])
@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_cached_captions_equal_uncached_ones(top_p, least, monkeypatch):
    monkeypatch.setattr(few_rows, "LEAST", least)
    net = captioner(max_bytes=40)
    pixels, fps = clips(4, 3, 5, 16, 16), torch.full((4,), 8.0)
    arguments = dict(top_p=top_p, draws=[3, 5, 7, 11])
    for style in ("short", "long"):
        assert net.generate(pixels, fps, style, **arguments) == net.generate(
            pixels, fps, style, cached=False, **arguments
        )
    memory, ids = net.decoder.memory(net.look(pixels, fps)[0]), torch.zeros(4, dtype=torch.int64)
    written, _ = net.decoder.write(net.look(pixels, fps)[0], ids, max_bytes=40, **arguments)
    again, _ = net.decoder.write(net.look(pixels, fps)[0], ids, max_bytes=40, cached=False, **arguments)
    assert written == again and any(len(data) > 5 for data in written) and memory


def test_logits_from_the_cache_equal_those_of_the_whole_caption():
    net = captioner()
    symbols, _, packing = encode_captions(["a red disc", "by night 夜"], 24)
    memory, ids = net.decoder.memory(torch.randn(2, 3, 16)), torch.tensor([0, 1])
    whole = packing.pad(net.decoder(symbols, ids, memory, packing))
    cache = Cache(2, 24, 2)
    for end in range(min(packing.lengths)):
        step = net.decoder.step(symbols[:, : end + 1], ids, memory, cache)
        torch.testing.assert_close(step, whole[:, end], rtol=1e-4, atol=1e-5)


def test_captions_of_unequal_length_do_not_disturb_each_other():
    net = captioner()
    captions, ids = ["a red disc", "b", "a much longer line"], torch.tensor([0, 1, 1])
    pooled = torch.randn(3, 3, 16)
    symbols, _, packing = encode_captions(captions, 24)
    together = net.decoder(symbols, ids, net.decoder.memory(pooled), packing).split(packing.lengths)
    for row, caption in enumerate(captions):
        symbols, _, packing = encode_captions([caption], 24)
        alone = net.decoder(symbols, ids[row : row + 1], net.decoder.memory(pooled[row : row + 1]), packing)
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-5)


def test_a_later_byte_never_changes_an_earlier_answer():
    net = captioner()
    one, _, packing = encode_captions(["abcdefgh"], 24)
    other, _, _ = encode_captions(["abcdeXYZ"], 24)
    memory, ids = net.decoder.memory(torch.randn(1, 3, 16)), torch.tensor([0])
    first, second = net.decoder(one, ids, memory, packing), net.decoder(other, ids, memory, packing)
    torch.testing.assert_close(first[:6], second[:6])
    assert not torch.allclose(first[6], second[6])


def test_a_style_changes_the_answer_and_an_unknown_one_is_refused():
    net = captioner()
    symbols, _, packing = encode_captions(["x"], 24)
    memory = net.decoder.memory(torch.randn(1, 3, 16))
    short, long = (net.decoder(symbols, net.style_ids([style]), memory, packing) for style in ("short", "long"))
    assert not torch.allclose(short, long)
    with pytest.raises(ConfigError, match="'poem'.*'short', 'long'"):
        net.generate(clips(1, 3, 1, 8, 8), torch.tensor([1.0]), "poem")


def test_captions_are_bytes_of_any_script_and_only_whole_ones_end():
    symbols, targets, packing = encode_captions(["ab", "三", "abcdef", ""], 4)
    assert [line.tolist() for line in packing.unpad(symbols).split(packing.lengths)] == [
        [START, 97, 98],
        [START, *"三".encode()],
        [START, 97, 98, 99],
        [START],
    ]
    assert [line.tolist() for line in targets.split(packing.lengths)] == [
        [97, 98, END],
        [*"三".encode(), END],
        [97, 98, 99, 100],
        [END],
    ]


def test_broken_utf8_and_control_characters_are_repaired():
    assert decode_caption("un café".encode()[:-1]) == "un caf"
    assert decode_caption(b"\xff\xfea red\x00\n  disc\xe4\xb8") == "a red disc"
    assert decode_caption("三只猫 🙂".encode()) == "三只猫 🙂"
    assert decode_caption(b"") == ""
    assert clean("a\u200b\ufeffb\u2028c \ud800") == "ab c ?"
    assert (
        clean("\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e")
        == "\U0001f468\u200d\U0001f469 \u0645\u06cc\u200c\u062e"
    )


class Dictated(Decoder):
    """A decoder that says given bytes, whatever it sees."""

    def __init__(self, lines: list[bytes]) -> None:
        super().__init__(dim=8, depth=1, num_heads=1, mlp_ratio=1.0, styles=1, table=8)
        self.lines = [[*line, END] for line in lines]

    def step(self, symbols_BS, styles_B, memory, cache):
        place, cache.length = cache.length, cache.length + 1
        logits = torch.zeros(len(symbols_BS), 257)
        for row, line in enumerate(self.lines):
            logits[row, line[min(place, len(line) - 1)]] = 9.0
        return logits


def test_each_caption_stops_at_its_own_end_and_says_whether_it_ended():
    decoder = Dictated([b"a disc", b"", "三只猫".encode(), b"far too long"])
    captions, ended = decoder.write(torch.zeros(4, 2, 8), torch.zeros(4, dtype=torch.int64), max_bytes=9)
    assert captions == [b"a disc", b"", "三只猫".encode(), b"far too l"]
    assert ended == [True, True, True, False]


def test_a_caption_that_goes_round_in_circles_is_given_up_at_once():
    decoder, seen = Dictated([b"a disc, " * 50, b"ha ha ha, a disc", b"x" * 300]), []
    step = decoder.step
    decoder.step = lambda *args: seen.append(1) or step(*args)
    captions, ended = decoder.write(torch.zeros(3, 2, 8), torch.zeros(3, dtype=torch.int64), max_bytes=400)
    assert ended == [False, True, False] and captions[1] == b"ha ha ha, a disc"
    assert len(seen) <= 40 and captions[0].startswith(b"a disc, a disc, ")


def test_circles_are_four_rounds_of_enough_symbols():
    assert circles([7] * 24, 24) and not circles([7] * 23, 24)
    assert circles([*range(20), *([1, 2, 3, 4, 5, 6] * 4)], 24) and not circles([1, 2, 3, 4, 5, 6] * 3, 8)
    assert circles([3, 1, 2] * 4, 8) and not circles([*([3, 1, 2] * 4), 9], 8) and not circles([], 8)


def test_clips_of_one_batch_may_be_described_in_different_styles():
    net = captioner(max_bytes=60)
    net.teach(["x" * 8, "y" * 30], ["short", "long"])
    pooled = net.look(clips(4, 3, 5, 16, 16), torch.full((4,), 8.0))[0]
    mixed = net.say(pooled, ["short", "long", "long", "short"], top_p=0.9, draws=[1, 2, 3, 4])
    alone = [
        net.say(pooled[i : i + 1], style, top_p=0.9, draws=[i + 1])[0]
        for i, style in enumerate(("short", "long", "long", "short"))
    ]
    assert mixed == alone


def test_a_style_is_known_once_taught_and_bounds_its_captions():
    net = captioner(max_bytes=100)
    assert net.known_styles == () and net.bound("long") == 100
    net.teach(["a disc", "三只猫", "x" * 90], ["short", "short", "long"])
    assert net.known_styles == ("short", "long")
    assert net.bound("short") == int(9 * 1.25) + 16 and net.bound("long") == 100


def test_the_nucleus_leaves_out_the_tail_and_keeps_proportions():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, 4)
    chance = torch.linspace(0, 1 - 1e-6, 4000)
    drawn = torch.bincount(choose(logits, chance, 0.75), minlength=4) / 4000
    torch.testing.assert_close(drawn, torch.tensor([0.625, 0.375, 0.0, 0.0]), atol=2e-3, rtol=0)
    assert choose(logits[:1], torch.tensor([0.999]), 1.0).item() == 3
    assert choose(logits[:1], None, 0.0).item() == 0
