"""Promises of the samplers, of segments, and of the generator that joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from soratrain.diffusion.flow import Flow
from soratrain.diffusion.sampler import euler, guided
from soratrain.diffusion.segments import Segment, flatten
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


def test_euler_converges_to_the_gaussians_mean_and_deviation() -> None:
    noise = torch.randn(50_000, generator=torch.Generator().manual_seed(0))
    errors = []
    for steps in (8, 64, 512):
        drawn = euler(gaussian_velocity, noise, Flow().grid(steps, 80))
        errors.append(abs(drawn.std().item() - STD))
        assert abs(drawn.mean().item() - MEAN) < 0.05
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01


def test_a_straight_path_is_exact_in_one_step() -> None:
    clean, noise = torch.randn(3, 4), torch.randn(3, 4)
    torch.testing.assert_close(euler(lambda x, sigma: noise - clean, noise, Flow().grid(1, 80)), clean)


def test_known_parts_come_back_bit_for_bit() -> None:
    noise = torch.randn(2, 4, 3)
    free = torch.tensor([True, False, True, False])[:, None]
    drawn = euler(lambda x, sigma: x * 3 + sigma, noise, Flow().grid(5, 80), free)
    assert torch.equal(drawn[:, 1::2], noise[:, 1::2]) and not torch.equal(drawn[:, ::2], noise[:, ::2])


def test_guidance_1_is_the_prompt_alone_and_0_is_no_prompt() -> None:
    conditional, unconditional = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(guided(conditional, unconditional, 1.0), conditional)
    assert torch.equal(guided(conditional, unconditional, 0.0), unconditional)


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
