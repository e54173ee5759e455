"""Promises of the stage that trains the autoencoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from soratrain.batch import VideoBatch, draw_of, random_crop
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.vae import VAE
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.vae import VAEStage
from soratrain.stages.vae_losses import foreground, kl

NET = partial(
    VAE,
    latent_channels=4,
    channels=[8, 16],
    time_strides=[2],
    space_strides=[2],
    encoder_blocks=[0, 1],
    decoder_blocks=[1, 1],
    time_kernels=[1, 3],
    front_strides=[2, 4],
)


def make(**options: float) -> VAEStage:
    stage = VAEStage(
        net=NET, optimizer=OptimizerFactory(name="muon", lr=1e-2), schedule=Schedule(), max_steps=100, **options
    )
    torch.manual_seed(0)
    stage.configure_model()
    return stage


def batch_of(samples: int = 3, frames: int = 5, seed: int = 0) -> VideoBatch:
    keys = tuple(f"{seed}-{index}" for index in range(samples))
    video = torch.stack(
        [
            torch.randint(0, 256, (frames, 16, 16, 3), generator=torch.Generator().manual_seed(draw_of(key)))
            for key in keys
        ]
    )
    return VideoBatch(
        keys=keys,
        captions=("",) * samples,
        fps=torch.full((samples,), 8.0),
        weights=torch.full((samples,), 1 / samples),
        draws=torch.tensor([draw_of(0, key) for key in keys]),
        scale=1.0,
        video=video.to(torch.uint8),
    )


def tile(x: Tensor) -> Tensor:
    return x.repeat(1, 1, 1, 2, 2)


def test_the_latents_statistics_are_written_beside_the_weights(tmp_path: Path) -> None:
    stage = make()
    stage.set_statistics([batch_of()])
    module, factory, extra = stage.exported()["vae"]
    weights.save(tmp_path, "vae", module, factory, extra)
    loaded, kept = weights.load(tmp_path, "vae")
    assert isinstance(loaded, VAE) and loaded.latent_std.max() < 1
    torch.testing.assert_close(torch.tensor(kept["statistics"]["mean"]), loaded.latent_mean, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.tensor(kept["statistics"]["std"]), loaded.latent_std, rtol=0, atol=1e-6)


def test_the_balance_of_reconstruction_and_divergence_does_not_change_with_clip_size() -> None:
    stage = make(l2_weight=1.0)
    x, y = torch.randn(2, 2, 3, 5, 16, 16).unbind()
    mean, logvar = torch.randn(2, 2, 4, 2, 2, 2).unbind()
    small = stage.reconstruction(x, y), kl(mean, logvar, values=x[0].numel())
    large = stage.reconstruction(tile(x), tile(y)), kl(tile(mean), tile(logvar), values=tile(x)[0].numel())
    torch.testing.assert_close(small, large)


def test_divergence_equals_the_closed_form_of_torch() -> None:
    mean, logvar = torch.randn(2, 2, 4, 2, 2, 2).unbind()
    normal = torch.distributions.Normal(mean, torch.exp(0.5 * logvar))
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1) / 7
    torch.testing.assert_close(kl(mean, logvar, values=7), expected)


def test_the_loss_depends_on_the_draws_and_not_on_the_global_generator() -> None:
    stage, batch = make(latent_noise=0.2), batch_of()
    torch.manual_seed(1)
    first = stage.training_step(batch, 0)
    torch.manual_seed(2)
    assert torch.equal(first, stage.training_step(batch, 0))
    assert not torch.equal(first, stage.training_step(replace(batch, draws=batch.draws + 1), 0))


def test_a_sample_s_loss_does_not_depend_on_its_place_in_the_batch() -> None:
    stage, batch = make(), batch_of()
    order = [2, 0, 1]
    weights = torch.tensor([0.5, 0.3, 0.2])
    moved = replace(batch, video=batch.video[order], draws=batch.draws[order], weights=weights[order])
    first = stage.training_step(replace(batch, weights=weights), 0)
    torch.testing.assert_close(stage.training_step(moved, 0), first)


def test_a_crop_is_a_window_of_its_clip_that_the_draw_alone_places() -> None:
    batch = batch_of(samples=20)
    cropped = random_crop(batch, 8)
    assert cropped.shape == (20, 5, 8, 8, 3)
    places = set()
    for clip, part in zip(batch.video, cropped, strict=True):
        windows = clip.unfold(1, 8, 1).unfold(2, 8, 1).permute(1, 2, 0, 4, 5, 3)
        found = (windows == part).flatten(2).all(2).nonzero()
        places.add(tuple(found[0].tolist()))
    assert len(places) > 10
    assert torch.equal(random_crop(replace(batch, keys=batch.keys[::-1]), 8), cropped)
    assert torch.equal(random_crop(batch, 64), batch.video)


def test_foreground_is_what_differs_from_the_clip_s_commonest_colour() -> None:
    x = torch.zeros(1, 3, 5, 16, 16)
    x[:, 0, :, 4:8, 4:8] = 0.5
    mask = foreground(x)
    assert mask.sum() == 5 * 16 and mask[..., 4:8, 4:8].all()


def test_the_foreground_s_weight_is_gone_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 3, 5, 16, 16)
    x[:, 0, :, 4:8, 4:8] = 0.5
    y, plain = torch.zeros_like(x), make()
    losses = {}
    for step in (0, 30, 60, 99):
        monkeypatch.setattr(VAEStage, "global_step", step)
        losses[step] = float(make(foreground_weight=4.0, foreground_until=0.6).reconstruction(x, y))
    base = float(plain.reconstruction(x, y))
    assert losses[0] == pytest.approx(5 * base) and losses[30] == pytest.approx(3 * base)
    assert losses[60] == losses[99] == pytest.approx(base)


@torch.no_grad()
def test_after_training_the_latents_of_the_clips_have_mean_zero_and_deviation_one() -> None:
    stage = make()
    batches = [batch_of(frames=frames, seed=seed) for seed, frames in enumerate((1, 5, 9))]
    stage.set_statistics(batches)
    latent = torch.cat([stage.vae.encode(batch.pixels()).transpose(0, 1).flatten(1) for batch in batches], dim=1)
    torch.testing.assert_close(latent.mean(1), torch.zeros(4), rtol=0, atol=1e-4)
    torch.testing.assert_close(latent.std(1, correction=0), torch.ones(4), rtol=1e-4, atol=0)


def test_statistics_of_nothing_are_refused() -> None:
    with pytest.raises(DataError, match="no clip"):
        make().set_statistics([])


def test_training_lowers_the_error() -> None:
    stage, batch = make(l2_weight=2.0, gradient_weight=0.1, latent_noise=0.1), batch_of()
    flat = replace(batch, video=batch.video[:, :1, :1, :1].expand_as(batch.video))
    optimizer = stage.optimizer_factory(stage.named_parameters())
    losses = []
    for _ in range(20):
        loss = stage.training_step(flat, 0)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"crop": -8}, "crop"),
        ({"crop": 12}, "crop=12: is no multiple of the VAE.s stride of 8 pixels; use 16"),
        ({"l1_weight": 0.0}, "make one positive"),
        ({"foreground_weight": 1.0, "foreground_until": 1.0}, "foreground_until"),
        ({"statistics_batches": 0}, "statistics_batches"),
    ],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make(**options)
