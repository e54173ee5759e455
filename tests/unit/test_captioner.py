"""Promises of the captioner: any size and duration, no clip is its neighbour, what teaches what."""

from __future__ import annotations

import pytest
import torch
from captioner_tiny import captioner, clips

from soratrain.errors import ConfigError, DataError
from soratrain.models.captioner import Captioner
from soratrain.models.text import ByteTextEncoder
from soratrain.models.video_encoder import sample_frames


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
