"""Promises of rectified flow."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from soratrain.diffusion.flow import EDGE, Flow, shifted
from soratrain.errors import ConfigError

LEVELS = torch.linspace(0.05, 0.95, 7)[:, None]


def test_the_ends_of_the_path_are_the_clean_latent_and_the_noise() -> None:
    clean, noise = torch.randn(2, 5), torch.randn(2, 5)
    assert torch.equal(Flow().noised(clean, noise, torch.tensor(0.0)), clean)
    assert torch.equal(Flow().noised(clean, noise, torch.tensor(1.0)), noise)


@pytest.mark.parametrize("prediction", ["velocity", "balanced"])
def test_conversions_between_velocity_clean_and_noise_round_trip(prediction: str) -> None:
    flow, clean, noise = Flow(prediction=prediction), torch.randn(7, 5), torch.randn(7, 5)
    noised, target = flow.noised(clean, noise, LEVELS), flow.target(clean, noise, LEVELS)
    torch.testing.assert_close(flow.to_clean(noised, target, LEVELS), clean)
    torch.testing.assert_close(flow.to_noise(noised, target, LEVELS), noise)
    torch.testing.assert_close(flow.to_velocity(noised, target, LEVELS), noise - clean)


def test_shift_1_is_the_identity_and_the_ends_never_move() -> None:
    sigma = torch.linspace(0, 1, 11)
    torch.testing.assert_close(shifted(sigma, 1.0), sigma)
    moved = shifted(sigma, 3.0)
    assert moved[0] == 0 and moved[-1] == 1 and (moved[1:-1] > sigma[1:-1]).all()
    torch.testing.assert_close(shifted(moved, 1 / 3), sigma)


def logit_normal_density(sigma: Tensor, mean: float, std: float) -> Tensor:
    """Return the density of logit-normal levels (Esser et al., 2024, eq. 19)."""
    scale = std * math.sqrt(2 * math.pi) * sigma * (1 - sigma)
    return torch.exp(-((torch.logit(sigma) - mean) ** 2) / (2 * std**2)) / scale


def test_levels_are_logit_normal_and_follow_their_uniform_numbers() -> None:
    flow = Flow(logit_mean=0.5, logit_std=0.8)
    uniform = (torch.arange(20_000) + 0.5) / 20_000
    levels = flow.levels(uniform, torch.full((20_000,), 80))
    assert (levels.diff() >= 0).all() and levels.min() >= EDGE and levels.max() <= 1 - EDGE
    counts = torch.histc(levels, bins=20, min=0, max=1) / 1000
    centres = (torch.arange(20) + 0.5) / 20
    torch.testing.assert_close(counts, logit_normal_density(centres, 0.5, 0.8), atol=0.05, rtol=0.05)


def test_longer_clips_get_more_noise_where_the_shift_follows_the_tokens() -> None:
    uniform, tokens = torch.full((3,), 0.5), torch.tensor([100, 400, 1600])
    torch.testing.assert_close(Flow().levels(uniform, tokens), torch.full((3,), 0.5))
    flow = Flow(shift=1.0, shift_tokens=400)
    torch.testing.assert_close(flow.levels(uniform, tokens), torch.tensor([1 / 3, 1 / 2, 2 / 3]))
    assert flow.grid(4, 400).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert flow.grid(4, 1600)[2] == 2 / 3


def test_a_level_depends_on_its_own_sample_alone() -> None:
    flow = Flow(shift=2.0, shift_tokens=64)
    uniform, tokens = torch.rand(5), torch.tensor([80, 16, 400, 80, 1])
    alone = torch.cat([flow.levels(uniform[i : i + 1], tokens[i : i + 1]) for i in range(5)])
    assert torch.equal(alone, flow.levels(uniform, tokens))


@pytest.mark.parametrize("prediction", ["velocity", "balanced"])
def test_the_loss_is_the_velocitys_error_and_with_clean_weight_1_the_clean_latents(prediction: str) -> None:
    clean, noise, guess = torch.randn(7, 5), torch.randn(7, 5), torch.randn(7, 5)
    for clean_weight in (0.0, 1.0):
        flow = Flow(clean_weight=clean_weight, prediction=prediction)
        noised = flow.noised(clean, noise, LEVELS)
        loss = (guess - flow.target(clean, noise, LEVELS)).square().mean(1) * flow.weight(LEVELS[:, 0])
        velocity = (flow.to_velocity(noised, guess, LEVELS) - (noise - clean)).square().mean(1)
        of_clean = (flow.to_clean(noised, guess, LEVELS) - clean).square().mean(1)
        torch.testing.assert_close(loss, of_clean if clean_weight else velocity)
    assert torch.equal(Flow().weight(LEVELS), torch.ones_like(LEVELS))


def test_a_balanced_prediction_has_variance_1_and_no_linear_part_of_the_input_left() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(100_000, generator=generator), torch.randn(100_000, generator=generator)
    for level in (0.05, 0.5, 0.95):
        flow, sigma = Flow(prediction="balanced"), torch.tensor(level)
        target = flow.target(clean, noise, sigma)
        assert abs(target.var() - 1) < 0.02 and abs((target * flow.noised(clean, noise, sigma)).mean()) < 0.02


def test_settings_out_of_range_are_refused() -> None:
    for wrong in ({"logit_std": 0.0}, {"shift": -1.0}, {"shift_tokens": -1}, {"prediction": "noise"}):
        with pytest.raises(ConfigError, match="objective"):
            Flow(**wrong)
