"""Promises of training the DiT on clips of which parts are given."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from data_tiny import write_latents
from dit_stage_tiny import DIT_FACTORY, TEXT_FACTORY, batch, stage
from loading import cached
from torch import Tensor

from soratrain.batch import LatentBatch
from soratrain.callbacks.metrics import modes_shown
from soratrain.data.assignment import Bucket
from soratrain.diffusion.arrange import Case
from soratrain.diffusion.conditioning import MODES, Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed.fit import fit
from soratrain.distributed.trainer import build_trainer
from soratrain.errors import ConfigError, DataError
from soratrain.models.dit import DiT
from soratrain.models.patchify import patchify_target
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

EVEN = {mode: 0.18 for mode in MODES}


def conditioned(mix: dict[str, float], **options: object) -> Conditioning:
    return Conditioning(**({"mix": mix, "tail_frames": [1, 5], "caption_dropout": 0.3} | options))  # type: ignore[arg-type]


def with_tails(indices: list[int], total: int = 4) -> LatentBatch:
    """Return the four samples' batch with ends, as they are stored."""
    plain = batch(indices, total)
    ends = []
    for index, latent in zip(indices, plain.latents, strict=True):
        random, (channels, frames, *space) = torch.Generator().manual_seed(100 + index), latent.shape
        lengths = {1: 1, 5: 2}
        ends.append(
            {
                count: torch.randn((channels, length, *space), generator=random)
                for count, length in lengths.items()
                if length <= frames
            }
        )
    return replace(plain, tails=tuple(ends))


def gradients(module: DiTStage, parts: list[list[int]]) -> dict[str, Tensor]:
    module.zero_grad()
    for part in parts:
        module.training_step(with_tails(part), 0).backward()
    return {name: parameter.grad.clone() for name, parameter in module.named_parameters()}


def losses(module: DiTStage, given: LatentBatch) -> Tensor:
    return module.losses(given, module.cases(given))[0]


def awake(module: DiTStage) -> DiTStage:
    """Give every weight a value, so that all that the net is told reaches its answer."""
    torch.manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return module


def today(module: DiTStage, given: LatentBatch) -> Tensor:
    """The loss as it was before anything but captions could be given."""
    clean = [latent.float() for latent in given.latents]
    noise = given.normal("noise", [latent.shape for latent in clean])
    counts = torch.tensor([latent[0].numel() for latent in clean]) // module.dit.patch_size
    sigma = module.objective.levels(given.uniform("sigma"), counts)
    samples, targets = [], []
    for latent, draw, level, fps in zip(clean, noise, sigma, given.fps.tolist(), strict=True):
        samples.append([Segment(module.objective.noised(latent, draw, level), level, fps)])
        targets.append(patchify_target(module.objective.target(latent, draw, level), module.dit.patch))
    flat = flatten(samples, module.dit.patch, module.dit.rope_time)
    dropped = (given.uniform("caption") < module.conditioning.caption_dropout).tolist()
    captions = ["" if drop else text for text, drop in zip(given.captions, dropped, strict=True)]
    prediction = module.dit(flat.tokens, *module.text(module.text.tokenize(captions)))
    errors = (prediction.float() - torch.cat(targets)).square().mean(-1)
    return given.mean(flat.mean(errors) * module.objective.weight(sigma))


@pytest.mark.parametrize("conditioning", [Conditioning(), conditioned({"rollout": 0.0})])
@pytest.mark.parametrize("prediction", ["velocity", "balanced"])
def test_text_to_video_alone_trains_as_before_bit_for_bit(prediction: str, conditioning: Conditioning) -> None:
    module = awake(stage(conditioning=conditioning))
    module.objective = Flow(shift=2.0, prediction=prediction, clean_weight=0.3)
    for indices in ([0, 1], [0, 1, 2, 3]):
        assert torch.equal(module.training_step(with_tails(indices), 0), today(module, batch(indices)))


@pytest.mark.parametrize("mode", [*MODES, "all"])
def test_a_steps_gradient_does_not_depend_on_how_its_samples_fall_into_packs(mode: str) -> None:
    module = stage(conditioning=conditioned(EVEN if mode == "all" else {mode: 1.0}, known_noise=0.1))
    assert mode == "all" or any(case.mode == mode for case in module.cases(with_tails([0, 1, 2, 3])))
    whole = gradients(module, [[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        for name, gradient in gradients(module, parts).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-5, rtol=1e-3, msg=name)


@pytest.mark.parametrize("mode", ["t2v", *MODES, "all"])
def test_every_parameter_has_a_gradient_whatever_modes_a_batch_drew(mode: str) -> None:
    mix = EVEN if mode == "all" else {} if mode == "t2v" else {mode: 1.0}
    module = stage(conditioning=conditioned(mix))
    for indices in ([0, 1, 2, 3], [2]):  # sample 2 is an image
        for name, gradient in gradients(module, [indices]).items():
            assert gradient is not None and gradient.isfinite().all(), name


@pytest.mark.parametrize("mode", ["prefix", "suffix", "connect", "inpaint"])
def test_what_is_given_gives_no_loss_but_alters_the_rest(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, given = awake(stage(conditioning=conditioned({mode: 1.0}))), with_tails([3])
    (case,) = module.cases(given)
    assert case.mode == mode
    before, seen = losses(module, given), []
    forward = module.dit.forward

    def spoilt(tokens, *text):  # what the net answers for known tokens is nonsense
        seen.append(known := (tokens.flags & 1).bool())
        return forward(tokens, *text) + 100.0 * known[:, None]

    monkeypatch.setattr(module.dit, "forward", spoilt)
    assert torch.equal(losses(module, given), before) and seen[0].any() and not seen[0].all()
    monkeypatch.undo()
    answers = []
    hook = module.dit.register_forward_hook(lambda net, arguments, out: answers.append((arguments[0], out)))
    losses(module, given)
    moved = with_tails([3])
    for latent in (*moved.latents, *moved.tails[0].values()):
        latent[:] = latent.flip(-1)
    noisy = module.objective.noised

    def only_given(clean, noise, sigma):  # of the other clip, what is noised stays this one's
        return noisy(given.latents[0].float(), noise, sigma) if clean.shape == given.latents[0].shape else clean

    monkeypatch.setattr(type(module.objective), "noised", lambda self, *values: only_given(*values))
    losses(module, moved)
    hook.remove()
    (tokens, one), (others, other) = answers
    free = ~(tokens.flags & 1).bool()
    assert torch.equal(tokens.values[free], others.values[free])
    assert not torch.equal(tokens.values[~free], others.values[~free])
    assert not torch.allclose(one[free], other[free], atol=1e-4)


def test_rollout_weighs_each_latent_frame_s_error_by_its_own_level(monkeypatch: pytest.MonkeyPatch) -> None:
    module = stage(conditioning=conditioned({"rollout": 1.0}))
    module.objective = Flow(prediction="balanced", clean_weight=0.5)
    given, seen = with_tails([3, 0]), []
    monkeypatch.setattr(module.dit, "forward", lambda tokens, *text: seen.append(tokens) or 0 * tokens.values)
    found = losses(module, given)
    sigma = seen[0].sigma[seen[0].rows]  # of each token: 3 frames of 2 tokens, then 2 of 4
    noise = given.normal("noise", [latent.shape for latent in given.latents])
    for place, (start, end, each) in enumerate([(0, 6, 2), (6, 14, 4)]):
        levels = sigma[start:end:each].view(1, -1, 1, 1)
        target = module.objective.target(given.latents[place], noise[place], levels)
        expected = (target.square() * module.objective.weight(levels)).mean()
        torch.testing.assert_close(found[place], expected)


def test_nan_in_one_clip_leaves_the_others_loss_untouched() -> None:
    module = awake(stage(conditioning=conditioned(EVEN)))
    clean = losses(module, with_tails([0, 1, 2, 3]))
    for spoilt in range(4):
        given = with_tails([0, 1, 2, 3])
        for latent in (given.latents[spoilt], *given.tails[spoilt].values()):
            latent[:] = float("nan")
        found = losses(module, given)
        assert found[spoilt].isnan()
        others = [place for place in range(4) if place != spoilt]
        torch.testing.assert_close(found[others], clean[others], atol=1e-5, rtol=1e-4)


def test_a_sample_is_shown_alike_wherever_it_lies() -> None:
    module = stage(conditioning=conditioned(EVEN))
    alone = [module.cases(with_tails([index]))[0] for index in range(4)]
    together = module.cases(with_tails([3, 2, 1, 0]))[::-1]
    assert [(case.mode, case.prefix, case.tail) for case in alone] == [
        (case.mode, case.prefix, case.tail) for case in together
    ]


def test_clips_without_stored_tails_train_as_text_to_video_and_that_is_reported() -> None:
    module = stage(conditioning=conditioned({"connect": 1.0}))
    module.training_step(batch([0, 1, 3]), 0)
    found = {name: float(value) for name, value in module.take_reported().items() if name.startswith("modes_")}
    assert found["modes_t2v"] == found["modes_too_short"] == 3 and found["modes_connect"] == 0
    module.training_step(with_tails([0, 1, 3]), 0)
    assert float(module.take_reported()["modes_connect"]) == 3
    plain = stage()
    plain.training_step(batch([0]), 0)
    assert not any(name.startswith("modes_") for name in plain.take_reported())


def test_the_shares_as_they_came_are_said_at_the_end() -> None:
    rows = [
        {"samples": "30", "modes_t2v": "0.9", "modes_prefix": "0.1"},
        {"samples": "10", "modes_t2v": "0.5", "modes_prefix": "0.5", "modes_too_short": "0.2", "captions_gt": "1"},
    ]
    assert modes_shown(rows) == (
        "clips shown as: t2v 80.0%, prefix 20.0%; 5.0% were too short, or had no stored end, for what was drawn"
    )
    assert modes_shown([{"samples": "3", "captions_gt": "1"}]) == ""


def test_a_patch_of_several_latent_frames_takes_no_ends() -> None:
    module = DiTStage(
        dit=partial(DiT, **{**DIT_FACTORY.keywords, "patch": (2, 2, 2)}),
        text=TEXT_FACTORY,
        objective=Flow(),
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(),
        max_steps=2,
        conditioning=conditioned({"suffix": 0.1}),
    )
    with pytest.raises(ConfigError, match="conditioning.mix.suffix=0"):
        module.configure_model()


def test_what_a_net_was_given_is_kept_beside_its_weights() -> None:
    extra = stage(conditioning=conditioned(EVEN)).exported()["dit"][2]
    assert extra["conditioning"]["mix"] == EVEN and extra["conditioning"]["tail_frames"] == [1, 5]


# --- stored tails, and whole runs -------------------------------------------------------------------------------------

SHAPES = [(32, 32, 9)] * 6 + [(32, 48, 17)] * 5 + [(32, 32, 1)] * 3 + [(32, 48, 5)] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_latents(tmp_path_factory.mktemp("tails"), SHAPES, tails=[1, 5, 9]))


@pytest.mark.parametrize("mode", [{"batch_size": 2}, {"batching": "pack", "batch_size": None, "tokens_per_batch": 200}])
@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.full)])
def test_tails_come_with_their_clips_where_they_are_asked_for(folder: str, mode: dict, workers: int) -> None:
    for given in cached(folder, tails=[5, 1], workers=workers, max_steps=12, **mode).train_dataloader():
        for latent, ends in zip(given.latents, given.tails, strict=True):
            wanted = [count for count in (1, 5) if count <= 1 + 4 * (latent.shape[1] - 1)]
            assert sorted(ends) == wanted
            for count, end in ends.items():
                assert (
                    end.shape == (4, 1 + (count - 1) // 4, *latent.shape[2:])
                    and (end == latent[0, 0, 0, 0] + 0.5).all()
                )
        moved = given.to("meta")
        assert all(end.device.type == "meta" for ends in moved.tails for end in ends.values())
    for given in cached(folder, max_steps=2, **mode).train_dataloader():
        assert given.tails == ()


def test_a_tail_that_does_not_belong_to_its_latent_is_refused(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    items = cached(folder, tails=[5]).items()
    stored = {"latent": torch.zeros(4, 3, 4, 4), "tail5": torch.zeros(4, 3, 4, 4)}
    monkeypatch.setattr("soratrain.data.dataset.safetensors.torch.load", lambda media: stored)
    with pytest.raises(DataError, match=r"tail5 of \(4, 3, 4, 4\) where \(4, 2, 4, 4\) belongs"):
        items.source.load(0, Bucket(32, 32, 9), 1)


class Kill(L.Callback):
    """Ends a run after `step`, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, given, index: int) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


def train(out: Path, folder: str, kill: int = -1, **options: object) -> list[dict[str, str]]:
    L.seed_everything(0, verbose=False)
    module = DiTStage(
        dit=DIT_FACTORY,
        text=TEXT_FACTORY,
        objective=Flow(),
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(warmup_steps=0),
        max_steps=8,
        conditioning=conditioned(EVEN, ramp=1.0),
    )
    data = cached(folder, tails=[1, 5], accumulate_blocks=2, **options)
    trainer = build_trainer(
        out=out, max_steps=8, accelerator="cpu", log_every=1, checkpoint_every=2, callbacks=[Kill(kill)]
    )
    fit(trainer, module, data)
    with (out / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_run_that_goes_on_shows_clips_as_the_unbroken_one_though_the_mix_grows(folder: str, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", folder)
    with pytest.raises(RuntimeError, match="killed"):
        train(tmp_path / "broken", folder, kill=5)
    again = train(tmp_path / "broken", folder)
    kept = [name for name in whole[0] if name in ("loss", "grad_norm") or name.startswith("modes_")]
    assert {"loss", "modes_t2v"} <= set(kept) and len(whole) == 8
    assert [[row[name] for name in kept] for row in again] == [[row[name] for name in kept] for row in whole]
    assert whole[0]["modes_t2v"] == "1" and float(whole[-1]["modes_t2v"]) < 1
    ones = [sum(float(row.get(f"modes_{mode}") or 0) for mode in ("t2v", *MODES)) for row in whole]
    assert ones == pytest.approx([1.0] * 8)


def test_a_case_that_nothing_is_given_in_is_text_to_video() -> None:
    assert Conditioning().case(1, (3, 2, 2), (1, 2, 2), (1,), 1.0) == Case("t2v", "t2v")
