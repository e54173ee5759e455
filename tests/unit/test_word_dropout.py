"""Promises of word dropout: a share of the caption is not read, in training alone, and each clip's by its own draw."""

from __future__ import annotations

import pytest
import torch
from vlm_parts_tiny import factory, save_encoder, save_language

from soratrain.errors import ConfigError
from soratrain.models.caption_model import CaptionModel
from soratrain.models.captioner import Captioner

SIZES = dict(dim=24, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, queries=3, table=64)
CAPTIONS = ["a red circle", "a blue box sinks", "a red circle"]


@pytest.fixture(scope="module", params=["coca", "vlm"])
def net(request, tmp_path_factory) -> CaptionModel:
    torch.manual_seed(0)
    if request.param == "coca":
        made: CaptionModel = Captioner(**SIZES, text_dim=16, vector_dim=8, max_bytes=24, patch=(2, 8, 8))
    else:
        folder = tmp_path_factory.mktemp("parts")
        save_encoder(folder / "clip", "clip")
        save_language(folder / "llama", "llama")
        made = factory(folder / "clip", folder / "llama")()
        made.read_stored()
    for param in made.parameters():  # zero-initialised layers would hide what a test is after
        if param.ndim > 1 and param.requires_grad:
            torch.nn.init.normal_(param, std=0.3)
    return made


def losses(net: CaptionModel, share: float, *, draws=(1, 2, 3), captions=CAPTIONS, train=True) -> torch.Tensor:
    net.train(train).word_dropout = share
    count = len(captions)
    pixels = (torch.arange(count * 3 * 5 * 16 * 16).reshape(count, 3, 5, 16, 16) % 7) / 3.0 - 1
    text = torch.randn(count, 16, generator=torch.Generator().manual_seed(1))
    return net(pixels, torch.full((count,), 8.0), captions, ["short"] * count, text, draws)[0]


def test_it_counts_in_training_alone_and_only_with_draws(net):
    whole = losses(net, 0.0)
    torch.testing.assert_close(losses(net, 0.5, train=False), whole)
    torch.testing.assert_close(losses(net, 0.5, draws=()), whole)
    assert (losses(net, 0.9) - whole).abs().min() > 1e-4


def test_which_symbols_are_left_out_depends_on_a_clips_own_draw(net):
    first, again, other = losses(net, 0.5), losses(net, 0.5, draws=(1, 8, 9)), losses(net, 0.5, draws=(7, 2, 3))
    assert torch.equal(first, losses(net, 0.5))
    torch.testing.assert_close(first[0], again[0])
    torch.testing.assert_close(first[1:], other[1:])
    assert abs(first[0] - other[0]) > 1e-4


def test_of_a_caption_that_is_not_read_at_all_no_word_says_what_comes_next(net):
    head = net.decoder.head if isinstance(net, Captioner) else net.language.here().get_output_embeddings()
    other = ["a circle red", "a sinks box blue", "a circle red"]
    assert [net.size(caption) for caption in other] == [net.size(caption) for caption in CAPTIONS]
    seen = []
    handle = head.register_forward_hook(lambda _module, _inputs, logits: seen.append(logits.detach()))
    for share in (1.0, 0.0):
        for captions in (CAPTIONS, other):
            losses(net, share, captions=captions)
    handle.remove()
    torch.testing.assert_close(seen[0], seen[1])
    assert (seen[2] - seen[3]).abs().max() > 1e-3


@pytest.mark.parametrize("share", [0.0, 0.2, 0.7])
def test_the_share_is_what_was_asked_for(share):
    net = Captioner(**SIZES, word_dropout=share).train()
    read = net.read_while_training([5000, 5000], [3, 4])
    assert read.float().mean().item() == pytest.approx(1 - share, abs=0.02)
    assert net.eval().read_while_training([7], [3]).all()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ConfigError, match="word_dropout"):
        Captioner(**SIZES, word_dropout=share)
