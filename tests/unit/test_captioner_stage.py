"""Promises of stage=captioner: styles are learned as they came, silent clips teach nothing, batches can be split."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist

from soratrain.batch import VideoBatch
from soratrain.errors import DataError
from soratrain.models.captioner import Captioner
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import PATIENCE
from soratrain.stages.captioner import ENOUGH, CaptionerStage


def stage(**changes) -> CaptionerStage:
    net = partial(
        Captioner, dim=24, depth=1, num_heads=2, decoder_dim=16, decoder_depth=1, decoder_heads=2, queries=2, table=64
    )
    built = CaptionerStage(
        net=partial(net, vector_dim=8, max_bytes=64),
        text=partial(ByteTextEncoder, dim=16, depth=1, num_heads=2, table=64),
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(name="constant", warmup_steps=0),
        max_steps=10,
        **changes,
    )
    torch.manual_seed(0)
    built.configure_model()
    return built


def batch(captions: list[str], styles: list[str], weights: list[float] | None = None) -> VideoBatch:
    count = len(captions)
    return VideoBatch(
        keys=tuple(f"{index:032x}" for index in range(count)),
        captions=tuple(captions),
        fps=torch.full((count,), 8.0),
        weights=torch.tensor(weights or [1 / count] * count),
        draws=torch.arange(count),
        scale=1.0,
        styles=tuple(styles),
        video=torch.randint(
            0, 256, (count, 5, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
        ),
    )


def test_the_loss_is_language_plus_weighted_contrast():
    captions, styles = ["a red disc", "a blue box"], ["short", "short"]
    plain, both = (stage(contrast_weight=weight) for weight in (0.0, 0.5))
    both.load_state_dict(plain.state_dict())
    language = plain.training_step(batch(captions, styles), 0)
    loss = both.training_step(batch(captions, styles), 0)
    reported = both.take_reported()
    torch.testing.assert_close(loss, language + 0.5 * reported["contrast"].float())
    torch.testing.assert_close(language, plain.take_reported()["language"].float())


def test_a_clip_without_a_caption_teaches_nothing_and_is_in_no_figure():
    built = stage(contrast_weight=0.5)
    torch.nn.init.normal_(built.captioner.decoder.head.weight)
    clips = batch(["a red disc", "", "a blue box"], ["short", "gt", "short"])
    grads, figures = [], []
    for other in (0, 255):
        video = clips.video.clone()
        video[1, :, :8] = other
        built.zero_grad()
        built.training_step(replace(clips, video=video), 0).backward()
        grads.append(built.captioner.encoder.embed.weight.grad.clone())
        figures.append(built.take_reported())
    torch.testing.assert_close(*grads)
    assert grads[0].abs().sum() > 0 and figures[0]["contrast"] > 0
    for name in ("language", "contrast"):
        torch.testing.assert_close(*(found[name] for found in figures))
    told = figures[0]["language"] + 0.5 * figures[0]["contrast"]
    torch.testing.assert_close(figures[0]["loss"] * 3 / 2, told)


def test_clips_without_captions_are_an_error_that_names_both_ways_out():
    built = stage()
    for step in range(PATIENCE - 1):
        assert built.training_step(batch(["", ""], ["", ""]), step) == 0
    with pytest.raises(DataError, match=r"NAME\.txt.*inputs\.captioner="):
        built.training_step(batch(["", ""], ["", ""]), PATIENCE)
    assert built.captioner.known_styles == ()


def test_a_few_silent_batches_among_others_are_no_error():
    built = stage()
    for step in range(2 * PATIENCE):
        captions = ["a disc", ""] if step % (PATIENCE - 1) == 0 else ["", ""]
        built.training_step(batch(captions, ["short", ""]), step)
    assert built.captioner.known_styles == ("short",)


def test_captions_teach_the_style_of_their_type_and_originals_that_of_their_length():
    built = stage(short_bytes=20)
    assert built.style_of("long", "a disc") == "long"
    assert built.style_of("gt", "a disc") == "short"
    assert built.style_of("gt", "a disc that is red and moves") == "long"
    assert built.captioner.known_styles == ()
    built.training_step(batch(["a red disc", "a box"], ["gt", "short"]), 0)
    assert built.captioner.known_styles == ("short",)
    built.training_step(batch(["a red disc", "a blue box moves left"], ["short", "gt"]), 0)
    assert built.captioner.known_styles == ("short", "long")


def test_a_style_that_must_come_and_does_not_is_one_line():
    each, clips = ENOUGH // PATIENCE, batch(["a disc"], ["short"])
    built = stage(teaches=["short", "tags"])
    with pytest.raises(DataError, match=rf"teaches=\['tags'\]: none of {ENOUGH} .*style 'tags'.*data.caption_types"):
        for _ in range(PATIENCE):
            built.watch(clips, ["short"] * each)
    fine = stage(teaches=["short", "tags"])
    for step in range(2 * PATIENCE):
        fine.watch(clips, ["short"] * (each - 1) + ["tags" if step == PATIENCE - 2 else "short"])


def test_a_style_that_comes_seldom_in_small_batches_is_waited_for():
    built = stage(teaches=["tags"])
    for _ in range(ENOUGH - 1):
        built.watch(batch(["a disc"], ["short"]), ["short"])
    built.watch(batch(["disc, red"], ["tags"]), ["tags"])
    assert not built.awaited


def test_captions_of_ten_thousand_words_are_cut_counted_and_said_once(caplog):
    built = stage()
    caplog.set_level("WARNING", logger="soratrain")
    for step in range(2):
        loss = built.training_step(
            batch(["a red disc " * 10000, "a\0 box\r\n", "\0\x07"], ["long", "short", "short"]), step
        )
        assert torch.isfinite(loss)
    assert built.take_reported()["captions_cut"] == 2
    assert caplog.text.count("captions_cut counts them") == 1
    assert built.captioner.longest.tolist()[:2] == [len("a box"), len("a red disc " * 10000) - 1]


def test_known_styles_are_kept_with_the_weights(tmp_path):
    from soratrain.models import weights

    built = stage()
    built.training_step(batch(["a red disc", "a box"], ["short", "short"]), 0)
    net, factory, extra = built.exported()["captioner"]
    weights.save(tmp_path, "captioner", net, factory, extra)
    loaded, _ = weights.load(tmp_path, "captioner")
    assert loaded.known_styles == ("short",)


def test_both_nets_are_exported_and_fit_together():
    exported = stage().exported()
    assert set(exported) == {"captioner", "text"}
    assert exported["captioner"][1].keywords["text_dim"] == exported["text"][1].keywords["dim"] == 16


def test_the_loss_reaches_every_parameter():
    built = stage()
    built.training_step(batch(["a red disc", "a blue box"], ["short", "long"]), 0).backward()
    # layers that start at zero hide those before them for one step
    for param in built.parameters():
        assert param.grad is not None and torch.isfinite(param.grad).all()


@pytest.mark.parametrize("when", ["the end", "a checkpoint"])
def test_the_longest_captions_of_all_ranks_are_remembered(when, monkeypatch):
    here, there = stage(), stage()
    here.captioner.teach(["a disc", "seen"], ["short", "long"])
    there.captioner.teach(["a much longer caption", "x"], ["short", "long"])
    expected = torch.maximum(here.captioner.longest, there.captioner.longest)

    def reduce(value: torch.Tensor, op: object) -> None:
        assert op == dist.ReduceOp.MAX
        value.copy_(torch.maximum(value, there.captioner.longest))

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", reduce)
    here.finalize() if when == "the end" else here.on_save_checkpoint({})
    assert torch.equal(here.captioner.longest, expected) and not torch.equal(expected, there.captioner.longest)
