"""Promises of the samplers, of segments, and of the generator that joins them."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.sampler import FITTING, Sampler, guided
from soratrain.diffusion.segments import Segment, flatten
from soratrain.diffusion.solvers import Predict, ancestral, ddim, dpmpp, euler, heun
from soratrain.errors import ConfigError
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

MEAN, STD = 1.5, 0.4
PATCH = (1, 2, 2)


def gaussian_velocity(x: Tensor, sigma: float) -> Tensor:
    """E[noise - clean | x] in closed form for clean ~ N(MEAN, STD²): a linear function of x."""
    variance = (1 - sigma) ** 2 * STD**2 + sigma**2
    deviation = x - (1 - sigma) * MEAN
    return (sigma / variance) * deviation - (MEAN + (1 - sigma) * STD**2 / variance * deviation)


def test_for_a_gaussian_the_closed_form_velocity_has_the_least_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    clean = MEAN + STD * torch.randn(200_000, generator=generator)
    noise = torch.randn(200_000, generator=generator)
    flow = Flow()
    for sigma in (0.2, 0.5, 0.8):
        level = torch.tensor(sigma)
        noised, target = flow.noised(clean, noise, level), flow.target(clean, noise, level)
        exact = gaussian_velocity(noised, sigma)
        slope, offset = torch.linalg.lstsq(torch.stack((noised, torch.ones_like(noised)), 1), target[:, None]).solution
        torch.testing.assert_close(exact, slope * noised + offset, atol=0.03, rtol=0)
        best = (exact - target).square().mean()
        assert all(((1 + tilt) * exact + push - target).square().mean() > best for tilt, push in ((0.1, 0), (0, 0.1)))


def closed_form(objective: Objective, points: list[tuple[float, float, float]]) -> Predict:
    """Return the best prediction for a mixture of Gaussians, each with its share, mean and deviation."""
    share, mean, std = torch.tensor(points, dtype=torch.float64).T

    def predict(x: Tensor, sigma: float) -> Tensor:
        a, s = objective.coefficients(torch.tensor(sigma, dtype=torch.float64))
        variance, off = a**2 * std**2 + s**2, x[:, None] - a * mean
        odds = (share.log() - off**2 / (2 * variance) - variance.log() / 2).softmax(1)
        clean = (odds * (mean + a * std**2 / variance * off)).sum(1)
        level = torch.tensor(sigma, dtype=torch.float64)
        return objective.target(clean, (x - a * clean) / s, level)

    return predict


def noise_of(count: int) -> Callable[[int], Tensor]:
    return lambda step: torch.randn(count, generator=torch.Generator().manual_seed(7 + step), dtype=torch.float64)


Solver = Callable[..., Tensor]
EVEN = torch.special.ndtri((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)  # noise of mean 0 and deviation 1
ONE, TWO = [(1.0, MEAN, STD)], [(0.3, -1.0, 0.02), (0.7, 1.0, 0.02)]
FLOWS: list[Objective] = [Flow(shift=2.0), Flow(prediction="balanced")]
DDPMS: list[Objective] = [
    DDPM(),
    DDPM(prediction="x0", shift=2.0),
    DDPM(prediction="epsilon", schedule="linear", zero_terminal_snr=False),
]
FINE = DDPM(timesteps=1_000_000)  # so many that levels need no rounding
PAIRS = [
    *((name, objective) for name in FITTING["flow"] for objective in FLOWS),
    *((name, objective) for name in FITTING["ddpm"] for objective in DDPMS),
]


def drawn(name: str, objective: Objective, points: list[tuple[float, float, float]], steps: int) -> Tensor:
    return Sampler(name=name, steps=steps)(
        closed_form(objective, points), EVEN, objective=objective, tokens=80, noise=noise_of(len(EVEN))
    )


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_every_sampler_converges_to_the_mean_and_deviation_of_a_gaussian_and_of_two_points(
    name: str, objective: Objective
) -> None:
    mixture_std = (0.3 * (-1.4) ** 2 + 0.7 * 0.6**2 + 0.02**2) ** 0.5
    for points, mean, std in ((ONE, MEAN, STD), (TWO, 0.4, mixture_std)):
        few, many = (drawn(name, objective, points, steps) for steps in (8, 400))
        assert many.mean().item() == pytest.approx(mean, abs=0.03)
        assert many.std().item() == pytest.approx(std, abs=0.03)
        if points is ONE:
            assert abs(many.std() - std) < abs(few.std() - std)


@pytest.mark.parametrize(
    ("solve", "objective", "order"),
    [(euler, Flow(), 1), (heun, Flow(), 2), (dpmpp, Flow(prediction="balanced"), 2), (ddim, FINE, 1), (dpmpp, FINE, 2)],
)
def test_when_steps_double_the_error_halves_or_quarters(solve: Solver, objective: Objective, order: int) -> None:
    def exact(sigma: float) -> Tensor:  # the ordinary differential equation keeps the quantiles
        a, s = objective.coefficients(torch.tensor(sigma, dtype=torch.float64))
        return a * MEAN + torch.sqrt(a**2 * STD**2 + s**2) * EVEN

    errors = []
    for steps in (10, 20, 40, 80):  # even in the logit of sigma, away from the ends, where lambda is infinite
        levels = torch.linspace(3, -3, steps + 1, dtype=torch.float64).sigmoid().tolist()
        found = solve(closed_form(objective, ONE), exact(levels[0]), objective, levels)
        errors.append((found - exact(levels[-1])).square().mean().sqrt().item())
    rates = [math.log2(one / other) for one, other in pairwise(errors)]
    assert rates[-1] == pytest.approx(order, abs=0.25), (errors, rates)


def test_second_order_needs_fewer_steps_than_euler_from_noise_to_clean() -> None:
    def error(name: str, objective: Objective, steps: int) -> float:
        return (drawn(name, objective, ONE, steps) - MEAN - STD * EVEN).square().mean().sqrt().item()

    assert max(error("heun", Flow(), 12), error("dpmpp", Flow(), 12)) < error("euler", Flow(), 48)
    assert error("dpmpp", DDPM(), 16) < error("ddim", DDPM(), 48)


def test_ddim_on_a_flows_coefficients_is_euler_and_the_first_steps_of_dpmpp_are_ddim() -> None:
    flow, ddpm = Flow(shift=2.0), DDPM()
    levels = flow.grid(12, 80).tolist()
    predict = closed_form(flow, ONE)
    torch.testing.assert_close(ddim(predict, EVEN, flow, levels), euler(predict, EVEN, flow, levels))
    levels = ddpm.grid(2, 80).tolist()  # each at an end, where lambda is infinite
    predict = closed_form(ddpm, TWO)
    torch.testing.assert_close(ddim(predict, EVEN, ddpm, levels), dpmpp(predict, EVEN, ddpm, levels))


def test_ancestral_steps_of_any_length_keep_the_noise_that_belongs_to_each_level() -> None:
    ddpm, levels = DDPM(), [1.0, 0.6, 0.3]
    found = ancestral(closed_form(ddpm, [(1.0, MEAN, 0.0)]), EVEN, ddpm, levels, noise=noise_of(len(EVEN)))
    a, s = ddpm.coefficients(torch.tensor(levels[-1], dtype=torch.float64))
    assert found.mean().item() == pytest.approx(float(a) * MEAN, abs=0.03)
    assert found.std().item() == pytest.approx(float(s), rel=0.05)


def test_a_straight_path_is_exact_in_one_step() -> None:
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(euler(lambda x, sigma: noise - clean, noise, Flow(), [1.0, 0.0]), clean)


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_known_parts_come_back_bit_for_bit_and_are_shown_to_the_net_as_they_are(
    name: str, objective: Objective
) -> None:
    start = torch.randn(2, 4, 3)
    free = torch.tensor([True, False, True, False])[:, None]

    def predict(x: Tensor, sigma: float) -> Tensor:
        assert torch.equal(x[:, 1::2], start[:, 1::2])
        return torch.tanh(x) + sigma

    noise = lambda step: torch.randn(2, 4, 3)  # noqa: E731
    found = Sampler(name=name, steps=5)(predict, start, objective=objective, tokens=80, free=free, noise=noise)
    assert torch.equal(found[:, 1::2], start[:, 1::2]) and not torch.equal(found[:, ::2], start[:, ::2])


@pytest.mark.parametrize(("name", "objective"), PAIRS)
def test_a_run_may_begin_part_of_the_way_with_as_much_fewer_steps(name: str, objective: Objective) -> None:
    sampler, seen = Sampler(name=name, steps=10), []
    whole, part = (sampler.levels(objective, 80, start) for start in (1.0, 0.5))
    assert len(whole) == 11 and len(part) == 6 and 0 < part[0] < whole[0] == 1 and part[-1] == 0
    predict = closed_form(objective, ONE)

    def spy(x: Tensor, sigma: float) -> Tensor:
        seen.append(sigma)
        return predict(x, sigma)

    clean = MEAN + STD * EVEN.flip(0)
    noised = objective.noised(clean, EVEN, part[0].double())
    found = sampler(spy, noised, objective=objective, tokens=80, start=0.5, noise=noise_of(len(EVEN)))
    assert seen[0] == part[0] and found.mean().item() == pytest.approx(MEAN, abs=0.1)
    for wrong in (0.0, 1.5):
        with pytest.raises(ConfigError, match=f"strength={wrong}"):
            sampler.levels(objective, 80, wrong)


def test_a_sampler_that_does_not_fit_the_objective_is_refused_and_auto_takes_one_that_does() -> None:
    assert Sampler().fitted(Flow()).name == "euler" and Sampler().fitted(DDPM()).name == "ddim"
    for name, objective in (("ddim", Flow()), ("ancestral", Flow()), ("euler", DDPM()), ("heun", DDPM())):
        with pytest.raises(ConfigError, match=f"sampler={name} does not fit objective={objective.name}; use .*dpmpp"):
            Sampler(name=name).fitted(objective)


@pytest.mark.parametrize(
    "wrong",
    [{"name": "eular"}, {"steps": 0}, {"guidance_scale": -1.0}, {"guidance_rescale": 1.5},
     {"guidance_interval": [0.5]}, {"guidance_interval": [0.6, 0.6]}, {"guidance_interval": [0.5, 2.0]}],
)  # fmt: skip
def test_settings_out_of_range_are_refused(wrong: dict) -> None:
    with pytest.raises(ConfigError, match=f"sampler.{next(iter(wrong))}"):
        Sampler(**wrong)


def test_guidance_1_is_the_prompt_alone_and_0_is_no_prompt() -> None:
    conditional, unconditional = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)


def test_guidance_acts_within_its_interval_and_not_at_scale_1() -> None:
    sampler = Sampler(guidance_scale=3.0, guidance_interval=[0.2, 0.8])
    assert [sampler.guides(level) for level in (1.0, 0.8, 0.5, 0.2, 0.1)] == [False, True, True, False, False]
    assert not any(Sampler(guidance_scale=1.0).guides(level) for level in (1.0, 0.5, 0.01))
    assert all(Sampler(guidance_scale=0.0).guides(level) for level in (1.0, 0.5, 0.01))


def test_rescaled_guidance_has_the_deviation_of_the_conditional_sample_by_sample() -> None:
    conditional, unconditional = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    conditional[1] *= 4
    plain = guided(conditional, unconditional, 5.0)
    full, half, none = (
        Sampler(guidance_scale=5.0, guidance_rescale=phi).guided(conditional, unconditional) for phi in (1.0, 0.5, 0.0)
    )
    torch.testing.assert_close(full.std((1, 2, 3)), conditional.std((1, 2, 3)))
    torch.testing.assert_close(half, (full + plain) / 2)
    everything = torch.ones(2, 1, 4, 5, dtype=torch.bool)
    same = Sampler(guidance_scale=5.0, guidance_rescale=1.0).guided(conditional, unconditional, everything)
    torch.testing.assert_close(same, full)
    assert torch.equal(none, plain)
    zero = torch.zeros(2, 3)
    assert torch.equal(Sampler(guidance_rescale=0.7).guided(zero, zero), zero)


def pieces() -> list[list[Segment]]:
    generator = torch.Generator().manual_seed(1)
    known = Segment(torch.randn(4, 1, 4, 4, generator=generator), torch.tensor(0.0), 8.0, known=True)
    noisy = Segment(
        torch.randn(4, 2, 4, 4, generator=generator), torch.tensor(0.7), 8.0, origin=(0.5, 0.0, 0.0), standalone=False
    )
    mixed = Segment(torch.randn(4, 1, 4, 4), torch.tensor([0.0, 0.4, 0.4, 0.9]), 8.0, known=torch.arange(4) == 0)
    return [[known, noisy], [mixed]]


def test_segments_flatten_to_one_pack_and_come_apart_again() -> None:
    samples = pieces()
    flat = flatten(samples, PATCH)
    tokens = flat.tokens
    assert tokens.packing.lengths == (12, 4) and flat.counts == (2, 1)
    assert tokens.sigma[tokens.rows].tolist() == torch.tensor([0.0] * 4 + [0.7] * 8 + [0.0, 0.4, 0.4, 0.9]).tolist()
    assert tokens.row_clips.tolist() == [0, 0, 1, 1, 1]
    assert flat.loss_mask.tolist() == [0.0] * 4 + [1.0] * 8 + [0.0, 1.0, 1.0, 1.0]
    assert tokens.flags.tolist() == [3] * 4 + [0] * 8 + [3, 2, 2, 2]
    assert tokens.coords[:, 0].tolist() == [0.0] * 4 + [3.0] * 4 + [6.0] * 4 + [0.0] * 4
    outs = torch.arange(16.0)[:, None].expand(16, 16)
    apart = flat.unflatten(outs)
    assert [[tuple(latent.shape) for latent in sample] for sample in apart] == [
        [(4, 1, 4, 4), (4, 2, 4, 4)],
        [(4, 1, 4, 4)],
    ]
    assert apart[0][1][0, :, ::2, ::2].flatten().tolist() == list(range(4, 12))


def test_a_samples_loss_is_the_mean_over_its_supervised_tokens() -> None:
    flat = flatten(pieces(), PATCH)
    losses = torch.cat((torch.full((4,), 100.0), torch.full((8,), 2.0), torch.tensor([100.0, 1.0, 2.0, 3.0])))
    torch.testing.assert_close(flat.mean(losses), torch.tensor([2.0, 2.0]))


def test_known_segments_give_no_loss_and_do_alter_the_rest() -> None:
    torch.manual_seed(0)
    net = DiT(channels=4, dim=32, depth=1, num_heads=2, text_dim=8)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, packing = torch.randn(2, 8), Packing.of([1, 1])
    samples = pieces()

    def out() -> tuple[Tensor, Tensor]:
        flat = flatten(samples, PATCH)
        prediction = net(flat.tokens, text, packing)
        return prediction, flat.mean(prediction.square().mean(-1))

    before, losses = out()
    samples[0][0].latent.requires_grad_(True)
    losses[1].backward()
    samples[0][0] = Segment(torch.randn(4, 1, 4, 4), torch.tensor(0.0), 8.0, known=True)
    after, _ = out()
    assert (after[4:12] - before[4:12]).abs().max() > 1e-4
    torch.testing.assert_close(after[12:], before[12:])


@pytest.mark.parametrize("objective", [Flow(shift=5.0), Flow(shift=3.0, shift_tokens=100), DDPM(shift=5.0)])
def test_strength_is_the_first_noise_level_whatever_the_shift(objective):
    for strength in (0.1, 0.35, 0.7, 1.0):
        for tokens in (80, 4000):
            first = float(Sampler(steps=20).levels(objective, tokens, strength)[0])
            assert first == pytest.approx(strength, abs=0.01), (objective, tokens)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp"])
def test_a_run_begins_at_pure_noise_exactly_however_small_the_shift(name: str) -> None:
    sampler, objective = Sampler(name=name, steps=4), Flow(shift=3.0, shift_tokens=75_600)
    for tokens in range(4, 4000, 40):  # an image's few tokens bring the shift far below 1
        assert float(objective.grid(4, tokens)[0]) == 1.0 and sampler.guides(float(objective.grid(4, tokens)[0]))
        assert sampler(lambda x, sigma: 0 * x, torch.ones(2), objective=objective, tokens=tokens).isfinite().all()
