"""Promises of a DiT that is trained on, and drawn with, the features of a frozen text encoder."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from dit_stage_tiny import DIT_FACTORY, FLOW, THREE, batch
from hf_tiny import KINDS, save
from test_dit_drawing import draw, export
from torch import Tensor

from soratrain.batch import LatentBatch
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.generator import Generator
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_text import HFText
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

Stage = Callable[..., DiTStage]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save("t5", tmp_path / "t5", dim=8)


def stage(folder: Path, *, dropout: float = 0.0, pooled: bool = False, **options: object) -> DiTStage:
    module = DiTStage(
        dit=partial(DIT_FACTORY, pooled_text=pooled),
        text=partial(FrozenText, **{"folder": str(folder), "dim": 8} | options),
        objective=FLOW,
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(warmup_steps=0),
        max_steps=10,
        conditioning=Conditioning(caption_dropout=dropout),
    )
    torch.manual_seed(0)
    module.configure_model()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def with_text(held: LatentBatch, text: list[Tensor | None]) -> LatentBatch:
    return replace(held, text=tuple(text))


def grads(module: DiTStage, held: LatentBatch) -> tuple[Tensor, dict[str, Tensor | None]]:
    module.zero_grad()
    loss = module.training_step(held, 0)
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooled", [False, True])
def test_stored_and_live_features_train_alike(kind: str, pooled: bool, tmp_path: Path) -> None:
    folder, held = save(kind, tmp_path, dim=8), batch([0, 1, 2, 3])
    encoder = HFText(folder=str(folder), dim=8)
    exact: list[Tensor | None] = list(encoder.features(encoder.tokenize(held.captions)[0]))
    module = stage(folder, pooled=pooled)
    live, gradients = grads(module, held)
    loss, others = grads(module, with_text(held, exact))
    torch.testing.assert_close(loss, live, rtol=1e-6, atol=1e-6)
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    rounded = module.training_step(with_text(held, list(encoder.store(held.captions)[0])), 0)
    assert 0 < abs(rounded - live) < 1e-3 * live
    nothing = module.training_step(with_text(held, [torch.zeros_like(f) for f in exact if f is not None]), 0)
    assert abs(nothing - live) > abs(rounded - live)


def test_the_encoder_is_not_trained_kept_averaged_or_exported(folder: Path) -> None:
    module = stage(folder)
    module.training_step(batch([0, 1]), 0).backward()
    assert [name for name, _ in module.text.named_parameters()] == ["null"]
    assert set(module.text.state_dict()) == {"null", "encoder_digest"}
    assert len(list(module.text.modules())) == 1
    assert isinstance(module.text, FrozenText)
    assert not any(parameter.requires_grad for parameter in module.text.encoder().load().parameters())


def test_every_parameter_is_in_the_graph_whichever_captions_are_dropped(folder: Path) -> None:
    for dropout in (0.0, 1.0):
        _, gradients = grads(stage(folder, dropout=dropout, pooled=True), batch([0, 1, 2, 3]))
        assert all(gradient is not None and gradient.isfinite().all() for gradient in gradients.values())
        null = gradients["text.null"]
        assert null is not None and bool(null.any()) == (dropout == 1.0)


def test_a_dropped_or_empty_caption_is_the_null_and_nothing_else(folder: Path) -> None:
    module = stage(folder)
    features, packing = module.text(module.text.tokenize(["", "clip 3", " \n", "clip 3", "clip"]))
    assert packing.lengths == (1, 3, 1, 3, 2)
    parts = features.split(list(packing.lengths))
    assert torch.equal(parts[0], module.text.null) and torch.equal(parts[2], module.text.null)
    assert torch.equal(parts[1], parts[3])
    held = batch([0, 1])
    dropped = stage(folder, dropout=1.0).training_step(held, 0)
    assert torch.equal(dropped, module.training_step(replace(held, captions=("", "")), 0))


def test_each_distinct_text_is_read_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text, read = FrozenText(folder=str(folder), dim=8), list[int]()
    features = HFText.features
    monkeypatch.setattr(
        HFText, "features", lambda self, ids, *rest: read.append(len(ids)) or features(self, ids, *rest)
    )
    text(text.tokenize(["clip 1", "clip 2", "", "clip 1", "clip 1"]))
    assert read == [2]
    text(text.tokenize(["", ""]))
    text(text.tokenize(["clip 1"], [torch.zeros(3, 8)]))
    assert read == [2]


def test_what_is_not_stored_is_read_live_or_refused(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoder = HFText(folder=str(folder), dim=8)
    one = encoder.store(["clip 1"])[0][0]
    for mode in ("auto", "live", "stored"):
        text = FrozenText(folder=str(folder), dim=8, features=mode)
        if mode != "live":
            text.begin({"latents": encoder.record()})
        if mode == "stored":
            with pytest.raises(DataError, match="caption 'clip 2' has no features.*stage.job.captions=FOLDER"):
                text.tokenize(["clip 1", "clip 2"], [one, None])
            assert text.tokenize(["clip 1", ""], [one, None]).lengths == (3, 1)
            assert text.tokenize(["clip 2"]).lengths == (3,)  # drawing reads its prompts
            continue
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            for _ in range(2):
                tokens = text.tokenize(["clip 1", "clip 2", "clip 3"], [one, None, torch.zeros(4, dtype=torch.int32)])
        assert [isinstance(item, Tensor) for item in tokens.distinct] == [mode == "auto", False, False]
        assert caplog.text.count("have no features beside their latents, 'clip 2' for one") == (mode == "auto")


def test_training_says_whence_features_come_and_refuses_those_of_another_encoder(folder: Path, tmp_path: Path) -> None:
    own = HFText(folder=str(folder), dim=8).record()
    other = HFText(folder=str(save("t5", tmp_path / "other", seed=1, dim=8)), dim=8).record()

    def begin(held: dict, **options: object) -> str:
        return FrozenText(**{"folder": str(folder), "dim": 8} | options).begin(held)  # type: ignore[arg-type]

    assert begin({"a": own, "b": own}) == f"text features of captions: stored, of {folder}"
    assert begin({"a": own, "b": None}).startswith("text features of captions: stored and live, of")
    for held in ({"a": None}, {"a": {"kind": "byte"}}, {}):
        assert begin(held) == f"text features of captions: live, by {folder}"
    assert "live, by" in begin({"a": other}, features="live")
    for options in ({}, {"features": "stored"}):
        with pytest.raises(
            DataError, match=r"^b holds text features of another encoder .*its digest differ.*fresh=true"
        ):
            begin({"a": own, "b": other}, **options)
    with pytest.raises(DataError, match="its max_tokens differ.* text.max_tokens=9;"):
        begin({"a": own}, max_tokens=9)
    with pytest.raises(DataError, match="text.features=stored: a holds no features"):
        begin({"a": {"kind": "byte"}}, features="stored")
    with pytest.raises(ConfigError, match="set text.dim=8"):
        begin({"a": own}, dim=16)
    with pytest.raises(ConfigError, match="text.features='cached' is unknown"):
        begin({}, features="cached")
    with pytest.raises(DataError, match="text.folder=/nowhere: is no folder"):
        begin({"a": own}, folder="/nowhere")
    with pytest.raises(DataError, match="text.dim=8: the stored text features are of shape"):
        FrozenText(folder=str(folder), dim=8).tokenize(["clip"], [torch.zeros(2, 16)])


def test_stored_features_of_an_encoder_on_the_hub_need_no_encoder_here(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    held = HFText(folder=str(folder), dim=8).record() | {"folder": "somebody/tiny"}
    text = FrozenText(folder="somebody/tiny", dim=8)
    assert "stored, of somebody/tiny" in text.begin({"a": held})
    assert text.record() == held
    with pytest.raises(DataError, match="cannot be had from the hub"):
        FrozenText(folder="somebody/else", dim=8).begin({"a": held})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_name_their_encoder_draw_with_it_and_refuse_another(kind: str, tmp_path: Path) -> None:
    folder = save(kind, tmp_path / "encoder", dim=8)
    module = stage(folder, pooled=True)
    module.training_step(batch([0, 1]), 0)
    export(tmp_path, module)
    document = yaml.safe_load((tmp_path / "weights" / "text.yaml").read_text())
    assert document["extra"]["encoder"] == HFText(folder=str(folder), dim=8).record()
    assert (tmp_path / "weights" / "text.safetensors").stat().st_size < 1000
    together = draw(tmp_path, ["clip 1", "clip 7 三只猫"])
    alone = draw(tmp_path, ["clip 7 三只猫"])
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1 and not np.array_equal(*together)
    save(kind, folder, seed=1, dim=8)
    with pytest.raises(DataError, match="trained with another text encoder"):
        draw(tmp_path, ["clip 1"])
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    with pytest.raises(DataError, match=f"text.folder={folder}: is no folder"):
        draw(tmp_path, ["clip 1"])


def test_guidance_leads_away_from_the_null(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(tmp_path, stage(folder))
    generate, seen = Generator.load(tmp_path, tmp_path), []
    forward = DiT.forward
    monkeypatch.setattr(DiT, "forward", lambda net, *args: seen.append(args[1:]) or forward(net, *args))
    generate(["clip 1 2"], height=16, width=32, frames=5, sampler=THREE)
    for features, packing in seen:
        assert packing.lengths == (4, 1) and torch.equal(features[4:], generate.text.null)


def test_prompts_of_any_length_and_script_are_drawn_or_one_clear_line(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    export(tmp_path, stage(folder, max_tokens=16))
    prompts = ["clip " * 1900, "三只猫 на улице", "\u200b"]
    with caplog.at_level(logging.WARNING):
        assert len(draw(tmp_path, prompts)) == 3
    assert "1 of 3 prompts are longer than 16 tokens; what follows is not read" in caplog.text
    assert len(draw(tmp_path, [""], sampler=replace(THREE, guidance_scale=0.0))) == 1
    with pytest.raises(ConfigError, match="prompt has 50000 bytes"):
        draw(tmp_path, ["clip " * 10_000])
    with pytest.raises(ConfigError, match=r"prompt='\\udcc3 clip': holds bytes that are no UTF-8 text"):
        draw(tmp_path, ["\udcc3 clip"])
    with pytest.raises(ConfigError, match="prompt is empty"):
        draw(tmp_path, ["  "])


def test_captions_that_are_cut_are_counted_in_training(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module, held = stage(folder, max_tokens=3), batch([0, 1])
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            module.training_step(held, 0)
    assert module.take_reported()["captions_cut"] == 4
    assert caplog.text.count("captions longer than text.max_tokens=3 are cut") == 1


def test_going_on_from_weights_of_another_encoder_is_refused(folder: Path, tmp_path: Path) -> None:
    module = stage(folder)
    module.training_step(batch([0, 1]), 0)
    export(tmp_path, module)
    other = save("t5", tmp_path / "other", seed=1, dim=8)
    for place, wrong in ((folder, False), (other, True)):
        again = FrozenText(folder=str(place), dim=8)
        weights.load_into(again, weights.load_state(tmp_path, "text")[0], "weights")
        if wrong:
            with pytest.raises(DataError, match="trained with another text encoder"):
                again.begin({})
        else:
            again.begin({})
