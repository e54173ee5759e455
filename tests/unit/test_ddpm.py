"""Promises of denoising diffusion with discrete timesteps."""

from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from soratrain.diffusion.ddpm import DDPM, alpha_bars
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import rebuilt
from soratrain.errors import ConfigError, DataError

KINDS = [
    {"prediction": "epsilon", "schedule": "linear", "zero_terminal_snr": False},
    {"prediction": "x0"},
    {"prediction": "v"},
    {"prediction": "v", "schedule": "linear"},
]
MEAN, STD = 1.5, 0.4
LEVELS = torch.tensor([0.001, 0.1, 0.5, 0.9, 0.999])[:, None]
ALL_TIMES = (torch.arange(1000) + 0.5) / 1000


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_with_zero_terminal_snr_the_last_timestep_is_pure_noise_and_the_first_as_it_was(
    schedule: str, timesteps: int
) -> None:
    bars, plain = alpha_bars(schedule, timesteps, True), alpha_bars(schedule, timesteps, False)
    assert bars[-1].item() == 0.0 and plain[-1] > 0
    assert bars[0] == 1 and (bars.diff() < 0).all()
    torch.testing.assert_close(bars[1], plain[1])
    noise = torch.randn(4)
    assert torch.equal(DDPM(schedule=schedule).noised(torch.randn(4), noise, torch.tensor(1.0)), noise)


def test_schedules_are_those_of_their_papers() -> None:
    linear, cosine = alpha_bars("linear", 1000, False), alpha_bars("cosine", 1000, False)
    assert linear[1].item() == pytest.approx(1 - 1e-4) and linear[-1].item() == pytest.approx(4.04e-5, rel=0.01)
    assert cosine[500].item() == pytest.approx(0.4938, abs=1e-3)
    assert 1 - (cosine[-1] / cosine[-2]).item() == pytest.approx(0.999)


@pytest.mark.parametrize("kind", KINDS)
def test_conversions_between_noise_clean_and_v_round_trip(kind: dict) -> None:
    ddpm, clean, noise = DDPM(**kind), torch.randn(5, 6).double(), torch.randn(5, 6).double()
    levels = LEVELS.double()
    noised, target = ddpm.noised(clean, noise, levels), ddpm.target(clean, noise, levels)
    torch.testing.assert_close(ddpm.to_clean(noised, target, levels), clean)
    torch.testing.assert_close(ddpm.to_noise(noised, target, levels), noise)
    torch.testing.assert_close(ddpm.to_velocity(noised, target, levels), noise - clean)


@pytest.mark.parametrize("kind", [{"prediction": "x0"}, {"prediction": "v"}])
def test_from_pure_noise_clean_and_noise_are_finite(kind: dict) -> None:
    ddpm, noise, answer, one = DDPM(**kind), torch.randn(6), torch.randn(6), torch.tensor(1.0)
    assert torch.equal(ddpm.to_noise(noise, answer, one), noise)
    assert torch.equal(ddpm.to_clean(noise, answer, one), answer if kind["prediction"] == "x0" else -answer)


@pytest.mark.parametrize("kind", KINDS)
def test_for_a_gaussian_the_closed_form_prediction_has_the_least_loss(kind: dict) -> None:
    ddpm, generator = DDPM(**kind), torch.Generator().manual_seed(0)
    clean = MEAN + STD * torch.randn(100_000, generator=generator).double()
    noise = torch.randn(100_000, generator=generator).double()
    for sigma in (0.2, 0.5, 0.9):
        level = torch.tensor(sigma).double()
        a, s = ddpm.coefficients(level)
        noised, target = ddpm.noised(clean, noise, level), ddpm.target(clean, noise, level)
        expected = MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (noised - a * MEAN)  # E[clean | noised]
        exact = ddpm.target(expected, (noised - a * expected) / s, level)
        best = (exact - target).square().mean()
        for tilt, push in ((0.1, 0), (-0.1, 0), (0, 0.1), (0, -0.1)):
            assert ((1 + tilt) * exact + push - target).square().mean() > best


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_clean_latents_error_by_the_snr_up_to_gamma(kind: dict) -> None:
    ddpm, levels = DDPM(**kind, min_snr=5.0), LEVELS.double()
    clean, noise, guess = (torch.randn(5, 6).double() for _ in range(3))
    noised = ddpm.noised(clean, noise, levels)
    loss = (guess - ddpm.target(clean, noise, levels)).square().mean(1) * ddpm.weight(levels[:, 0])
    a, s = ddpm.coefficients(levels)
    of_clean = (ddpm.to_clean(noised, guess, levels) - clean).square().mean(1)
    torch.testing.assert_close(loss, of_clean * ((a / s) ** 2).clamp(max=5.0)[:, 0])
    assert torch.equal(DDPM(**kind).weight(levels), torch.ones_like(levels))


def test_above_a_floor_of_the_snr_pure_noise_counts_and_without_it_it_does_not() -> None:
    one = torch.tensor([1.0])
    assert DDPM(min_snr=5.0).weight(one).item() == 0.0
    for prediction in ("v", "x0"):  # at SNR 0 both are the clean latent
        assert DDPM(prediction=prediction, min_snr=5.0, snr_floor=1.0).weight(one).item() == 1.0


def test_timesteps_are_drawn_evenly_and_shift_1_is_the_identity() -> None:
    tokens = torch.full((1000,), 80)
    for kind in KINDS:
        levels = DDPM(**kind, shift=1.0).levels(ALL_TIMES, tokens)
        torch.testing.assert_close(levels, torch.arange(1, 1001) / 1000)
        torch.testing.assert_close(DDPM(**kind, shift=1.0, shift_tokens=80).levels(ALL_TIMES, tokens), levels)


def test_a_shift_multiplies_noise_against_clean_and_longer_clips_get_more() -> None:
    def ratio(ddpm: DDPM, sigma: torch.Tensor) -> torch.Tensor:
        a, s = ddpm.coefficients(sigma.double())
        return s / a

    times, tokens = ALL_TIMES[100:700], torch.full((600,), 1600)
    plain, shifted = DDPM(), DDPM(shift=1.5, shift_tokens=400)
    before, after = plain.levels(times, tokens), shifted.levels(times, tokens)
    torch.testing.assert_close(ratio(shifted, after), 3 * ratio(plain, before), rtol=0.02, atol=0)
    assert DDPM(shift=9.0).levels(torch.tensor([0.9999]), tokens[:1]).item() == 1.0
    linear = DDPM(schedule="linear", zero_terminal_snr=False, shift=9.0)
    assert linear.levels(torch.tensor([0.9999, 0.9]), tokens[:2]).tolist() == [1.0, 1.0]


def test_sampling_begins_at_the_last_timestep_and_is_spaced_from_there() -> None:
    grid = DDPM().grid(4, 80)
    assert grid.tolist() == pytest.approx([1.0, 0.75, 0.5, 0.25, 0.0])
    assert DDPM().grid(3, 80).tolist() == pytest.approx([1.0, 0.667, 0.333, 0.0])
    assert DDPM().grid(4, 80, 0.5).tolist() == pytest.approx([0.5, 0.375, 0.25, 0.125, 0.0])
    shifted = DDPM(shift=5.0).grid(50, 80)
    assert shifted[0] == 1 and shifted[-1] == 0 and (shifted.diff() < 0).all() and shifted[25] > 0.8
    assert len(DDPM(timesteps=10).grid(1000, 80)) == 11


def test_noise_predicted_from_pure_noise_is_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match="prediction=epsilon.*use objective.prediction=v.*zero_terminal_snr=false"):
        DDPM(prediction="epsilon")


@pytest.mark.parametrize(
    "wrong",
    [{"prediction": "noise"}, {"schedule": "sigmoid"}, {"timesteps": 1}, {"min_snr": -1.0}, {"shift": 0.0},
     {"shift_tokens": -1}, {"min_snr": 1.0, "snr_floor": 2.0}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match="objective"):
        DDPM(**wrong)


def test_an_objective_comes_back_from_its_plain_values_and_an_unknown_one_is_refused() -> None:
    for objective in (Flow(shift=2.0, prediction="balanced"), DDPM(schedule="linear", min_snr=3.0)):
        assert rebuilt(asdict(objective)) == objective
    with pytest.raises(DataError, match="'edm'; this version knows flow, ddpm"):
        rebuilt({"name": "edm"})
    with pytest.raises(DataError, match="flow has curl=3"):
        rebuilt({"name": "flow", "curl": 3})
