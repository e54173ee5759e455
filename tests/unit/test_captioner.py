"""Promises of the captioner: any size and duration, cached equals uncached, one clip is not another's neighbour."""

from __future__ import annotations

import pytest
import torch

from soratrain.errors import ConfigError, DataError
from soratrain.models.caption_decoder import (
    END,
    START,
    Cache,
    Decoder,
    decode_caption,
    encode_captions,
)
from soratrain.models.captioner import Captioner
from soratrain.models.text import ByteTextEncoder
from soratrain.models.video_encoder import sample_frames
from soratrain.models.writing import choose, circles, clean


def captioner(**changes) -> Captioner:
    torch.manual_seed(0)
    sizes = dict(dim=24, depth=2, num_heads=2, decoder_dim=16, decoder_depth=2, decoder_heads=2, queries=3, table=64)
    net = Captioner(**(sizes | dict(text_dim=16, vector_dim=8, max_bytes=24, patch=(2, 8, 8)) | changes)).eval()
    for param in net.parameters():  # zero-initialised layers would hide what a test is after
        if param.ndim > 1:
            torch.nn.init.normal_(param, std=0.3)
    return net


def clips(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_any_size_duration_and_image_has_a_vector_and_a_caption():
    net = captioner()
    for shape in ((2, 3, 17, 64, 64), (1, 3, 9, 48, 80), (3, 3, 1, 30, 21), (1, 3, 5, 8, 8)):
        pixels, fps = clips(*shape), torch.full((shape[0],), 8.0)
        vectors = net.embed_video(pixels, fps)
        assert vectors.shape == (shape[0], 8)
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(shape[0]))
        assert len(net.generate(pixels, fps, "short")) == len(net.generate(pixels, fps, style="long")) == shape[0]


def test_frames_are_taken_by_time_not_by_index():
    index, count = sample_frames(33, torch.tensor([8.0, 16.0, 32.0]), 8.0, 100)
    assert count.tolist() == [33, 17, 9]
    assert index[0].tolist() == list(range(33))
    assert index[1, :17].tolist() == list(range(0, 33, 2)) and index[1, 17:].unique().tolist() == [32]
    assert index[2, :9].tolist() == list(range(0, 33, 4))
    # a rate that is no fraction of the clip's, and a clip slower than the rate
    assert sample_frames(31, torch.tensor([30.0]), 8.0, 100)[0].tolist() == [[0, 4, 8, 11, 15, 19, 22, 26, 30]]
    assert sample_frames(4, torch.tensor([2.0]), 8.0, 100)[0].tolist() == [[0, 1, 2, 3]]
    assert sample_frames(1, torch.tensor([1.0]), 8.0, 100)[0].tolist() == [[0]]


def test_a_clip_longer_than_the_limit_is_seen_from_its_first_to_its_last_frame():
    index, count = sample_frames(1001, torch.tensor([8.0]), 8.0, 11)
    assert count.tolist() == [11]
    assert index[0].tolist() == list(range(0, 1001, 100))


def test_the_same_motion_at_twice_the_frame_rate_looks_the_same():
    net = captioner(frame_rate=4.0)
    slow = clips(1, 3, 9, 16, 16)
    fast = slow.repeat_interleave(2, dim=2)[:, :, :17]
    torch.testing.assert_close(
        net.embed_video(slow, torch.tensor([4.0])), net.embed_video(fast, torch.tensor([8.0])), rtol=1e-4, atol=1e-5
    )


def test_a_batch_changes_no_clip_even_where_frame_rates_differ():
    net = captioner()
    pixels, fps = clips(3, 3, 17, 16, 24), torch.tensor([8.0, 16.0, 30.0])
    together = net.look(pixels, fps)
    for row in range(3):
        alone = net.look(pixels[row : row + 1], fps[row : row + 1])
        for whole, single in zip(together, alone, strict=True):
            torch.testing.assert_close(whole[row : row + 1], single, rtol=1e-4, atol=1e-5)


def test_every_patch_holds_its_own_pixels_in_raster_order():
    net = captioner()
    pixels = torch.zeros(1, 3, 4, 16, 24)
    pixels[0, :, 2:4, 8:16, 16:24] = 1.0  # second time step, second row, third column
    patches, coords, _, packing = net.encoder.cut(pixels, torch.tensor([8.0]))
    assert packing.lengths == (12,)
    assert torch.equal(patches[:11], patches[:1, :1].expand(11, patches.shape[1]))
    assert torch.equal(patches[11], patches[11, :1].expand(patches.shape[1])) and patches[11, 0] > patches[0, 0] + 1
    torch.testing.assert_close(coords[11], torch.tensor([2.5 / 8 * 6.0, 1.0, 2.0]))


@pytest.mark.parametrize("stem", [(4,), (4, 6, 8)])
def test_a_stem_keeps_every_promise_about_size_and_batch(stem):
    net = captioner(stem=stem)
    pixels, fps = clips(3, 3, 17, 20, 30), torch.tensor([8.0, 16.0, 30.0])
    together = net.look(pixels, fps)[0]
    for row in range(3):
        alone = net.look(pixels[row : row + 1], fps[row : row + 1])[0]
        torch.testing.assert_close(together[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_a_patch_that_the_stem_does_not_divide_is_refused():
    with pytest.raises(ConfigError, match=r"\[2, 8, 12\].*stride 8"):
        captioner(patch=(2, 8, 12), stem=(4, 4, 4))


def test_clips_are_cut_without_their_colour_and_contrast_which_travel_beside():
    net = captioner()
    pixels, fps = clips(2, 3, 5, 16, 16), torch.tensor([8.0, 30.0])
    shifted = pixels * 0.5 + torch.tensor([0.1, -0.2, 0.3])[:, None, None, None]
    (one, _, place, _), (other, _, moved, _) = net.encoder.cut(pixels, fps), net.encoder.cut(shifted, fps)
    torch.testing.assert_close(one, other, rtol=0.05, atol=0.05)
    assert not torch.allclose(one[:8].mean(), pixels[0].mean(), atol=1e-4) and abs(one[:8].mean()) < 0.2
    torch.testing.assert_close(moved[0, 5:8], place[0, 5:8] * 0.5 + torch.tensor([0.1, -0.2, 0.3]))
    torch.testing.assert_close(moved[:, 8] - 0.05, (place[:, 8] - 0.05) * 0.5)


def test_the_order_of_frames_is_seen():
    net = captioner()
    pixels = clips(1, 3, 9, 16, 16)
    there, back = (net.embed_video(video, torch.tensor([8.0])) for video in (pixels, pixels.flip(2)))
    assert not torch.allclose(there, back, atol=1e-3)


@pytest.mark.parametrize("top_p", [0.0, 0.9])
def test_cached_captions_equal_uncached_ones(top_p):
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
    cache = Cache(2, 24)
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


def test_identical_captions_in_a_batch_are_not_negatives():
    net = captioner()
    torch.manual_seed(1)
    video, text = torch.randn(3, 24), torch.randn(3, 16)
    text[1] = text[0]  # two clips with one caption
    apart, same = torch.eye(3, dtype=torch.bool), torch.eye(3, dtype=torch.bool)
    same[0, 1] = same[1, 0] = True
    known, unknown = net.contrast(video, text, same), net.contrast(video, text, apart)
    assert known[0] < unknown[0] and known[1] < unknown[1]
    alone = net.contrast(video[[0, 2]], text[[0, 2]], torch.eye(2, dtype=torch.bool))
    # the first clip's own direction (video to text) sees only the third as a negative
    scores = (
        net.contrast.log_scale.exp()
        * net.embed_text(text)
        @ torch.nn.functional.normalize(net.contrast.video(video), dim=-1).T
    )
    expected = (scores[[0, 2], 0].logsumexp(0) + scores[0, [0, 2]].logsumexp(0)) / 2 - scores[0, 0]
    torch.testing.assert_close(known[0], expected)
    torch.testing.assert_close(alone[0], expected)


def test_loss_reaches_every_parameter_and_the_text_encoder():
    net, text = captioner(), ByteTextEncoder(dim=16, depth=1, num_heads=2, table=64)
    captions = ["a red disc", "a blue box moves left", "a red disc"]
    features, packing = text(text.tokenize(captions))
    language, contrast = net(
        clips(3, 3, 5, 16, 16), torch.full((3,), 8.0), captions, ["short", "long", "short"], packing.mean(features)
    )
    assert language.shape == contrast.shape == (3,)
    (language.sum() + contrast.sum()).backward()
    for module in (net, text):
        for name, param in module.named_parameters():
            assert param.grad is not None and torch.isfinite(param.grad).all(), name


def test_a_clip_without_frames_is_refused():
    with pytest.raises(DataError, match="no frames"):
        captioner().embed_video(torch.zeros(1, 3, 0, 8, 8), torch.tensor([8.0]))


@pytest.mark.parametrize("changes", [{"styles": []}, {"styles": ["short", "short"]}, {"dim": 25}, {"decoder_dim": 18}])
def test_a_captioner_that_cannot_be_built_says_why(changes):
    with pytest.raises(ConfigError):
        captioner(**changes)


def test_no_style_and_a_style_named_twice_are_told_apart():
    with pytest.raises(ConfigError, match=r"names no style; .*captioner\.styles=\[short,long\]"):
        captioner(styles=[])
    with pytest.raises(ConfigError, match="must name each style once"):
        captioner(styles=["short", "short"])


def test_it_learns_to_tell_two_clips_apart_in_both_styles():
    torch.manual_seed(0)
    net = Captioner(
        dim=24,
        depth=1,
        num_heads=2,
        decoder_dim=32,
        decoder_depth=1,
        decoder_heads=2,
        queries=2,
        table=64,
        text_dim=16,
        vector_dim=8,
        max_bytes=24,
        patch=(2, 8, 8),
    )
    text = ByteTextEncoder(dim=16, depth=0, num_heads=2, table=64)
    pixels = torch.stack([torch.full((3, 3, 16, 16), 0.8), torch.full((3, 3, 16, 16), -0.8)]).repeat(2, 1, 1, 1, 1)
    fps, captions = torch.full((4,), 8.0), ["white", "black", "it is all white", "it is all black"]
    styles = ["short", "short", "long", "long"]
    optimizer = torch.optim.AdamW([*net.parameters(), *text.parameters()], lr=1e-2)
    for _ in range(120):
        features, packing = text(text.tokenize(captions))
        language, contrast = net(pixels, fps, captions, styles, packing.mean(features))
        loss = language.mean() + 0.2 * contrast.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    net.eval()
    assert net.generate(pixels[:2], fps[:2], "short") == captions[:2]
    assert net.generate(pixels[:2], fps[:2], "long") == captions[2:]
