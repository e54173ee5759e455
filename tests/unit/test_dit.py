"""Promises of the DiT: a pack is its clips, nothing more."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from soratrain.diffusion.segments import Segment, flatten
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT
from soratrain.models.tokens import Tokens

PATCH = (1, 2, 2)
SHAPES = [(4, 2, 4, 4), (4, 1, 4, 6), (4, 3, 2, 4)]
EQUAL = [(4, 2, 4, 4)] * 3


def build(**kwargs: object) -> DiT:
    """Return a tiny DiT whose zero-initialised parts have been moved off zero."""
    torch.manual_seed(0)
    settings = dict(channels=4, dim=32, depth=2, num_heads=2, text_dim=16, mlp_ratio=2.0)
    net = DiT(**{**settings, **kwargs})  # type: ignore[arg-type]
    for parameter in net.parameters():
        if parameter.ndim == 1 or not parameter.detach().any():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1 and bool(parameter.detach().any())), std=0.2)
    return net


def clips(shapes: list[tuple[int, ...]]) -> list[Segment]:
    generator = torch.Generator().manual_seed(1)
    return [
        Segment(torch.randn(shape, generator=generator), torch.tensor(0.2 + 0.3 * index), fps=8.0 + index)
        for index, shape in enumerate(shapes)
    ]


def texts(count: int) -> tuple[Tensor, Packing]:
    packing = Packing.of([3, 1, 5][:count])
    return torch.randn(packing.total, 16, generator=torch.Generator().manual_seed(2)), packing


def run(net: DiT, segments: list[Segment], text: Tensor, packing: Packing) -> Tensor:
    return net(flatten([[segment] for segment in segments], net.patch).tokens, text, packing)


@pytest.mark.parametrize("kwargs", [{}, {"pooled_text": True}, {"qk_norm_full": True, "cross_norm": False}])
@pytest.mark.parametrize("shapes", [SHAPES, EQUAL])
def test_a_pack_equals_its_clips_one_by_one_in_outputs_and_gradients(
    shapes: list[tuple[int, ...]], kwargs: dict[str, object]
) -> None:
    net, segments = build(**kwargs), clips(shapes)
    text, packing = texts(3)
    together = run(net, segments, text, packing)
    together.square().sum().backward()
    packed = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    parts = []
    for segment, words in zip(segments, text.split(packing.lengths), strict=True):
        parts.append(run(net, [segment], words, Packing.of([len(words)])))
        parts[-1].square().sum().backward()
    torch.testing.assert_close(together, torch.cat(parts), atol=1e-5, rtol=1e-4)
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(packed[name], parameter.grad, atol=2e-4, rtol=2e-3, msg=name)


def test_permuting_a_pack_permutes_its_outputs() -> None:
    net, segments = build(), clips(SHAPES)
    text, packing = texts(3)
    order = [2, 0, 1]
    outs = run(net, segments, text, packing).split(flatten([[s] for s in segments], PATCH).tokens.packing.lengths)
    words = text.split(packing.lengths)
    swapped = run(
        net,
        [segments[i] for i in order],
        torch.cat([words[i] for i in order]),
        Packing.of([packing.lengths[i] for i in order]),
    )
    torch.testing.assert_close(swapped, torch.cat([outs[i] for i in order]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shapes", [SHAPES, EQUAL])
def test_nan_in_one_clip_leaves_the_others_untouched(shapes: list[tuple[int, ...]]) -> None:
    net, segments = build(), clips(shapes)
    text, packing = texts(3)
    clean = run(net, segments, text, packing)
    segments[1] = replace(segments[1], latent=torch.full_like(segments[1].latent, torch.nan))
    spoilt = run(net, segments, text, packing)
    first, second, _ = flatten([[s] for s in segments], PATCH).tokens.packing.lengths
    assert torch.equal(spoilt[:first], clean[:first]) and torch.equal(spoilt[first + second :], clean[first + second :])
    assert spoilt[first : first + second].isnan().all()


@pytest.mark.parametrize("pooled", [False, True])
def test_an_untrained_net_returns_exactly_zero_and_one_step_gives_every_parameter_a_finite_gradient(
    pooled: bool,
) -> None:
    net = DiT(channels=4, dim=32, depth=2, num_heads=2, text_dim=16, pooled_text=pooled)
    segments, (text, packing) = clips(SHAPES), texts(3)
    assert not run(net, segments, text, packing).any()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (run(net, segments, text, packing) - 1).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()
    missing = [name for name, parameter in net.named_parameters() if not parameter.grad.any()]
    assert missing == [], f"parameters that nothing trains: {missing}"


def test_a_shift_of_all_coordinates_changes_nothing_and_a_swap_of_axes_does() -> None:
    net, segments = build(), clips(SHAPES)
    text, packing = texts(3)
    tokens = flatten([[segment] for segment in segments], PATCH).tokens
    out = net(tokens, text, packing)
    moved = replace(tokens, coords=tokens.coords + torch.tensor([7.5, -3.0, 11.0]))
    torch.testing.assert_close(net(moved, text, packing), out, atol=1e-4, rtol=1e-3)
    swapped = replace(tokens, coords=tokens.coords[:, [0, 2, 1]])
    assert (net(swapped, text, packing) - out).abs().max() > 1e-3


def test_noise_level_text_flags_and_frame_rate_all_alter_the_output() -> None:
    net, segments = build(), clips(SHAPES)
    text, packing = texts(3)
    tokens = flatten([[segment] for segment in segments], PATCH).tokens
    out = net(tokens, text, packing)
    others = [replace(tokens, sigma=tokens.sigma + 0.1), replace(tokens, flags=tokens.flags ^ 1)]
    faster = flatten([[replace(segment, fps=24.0)] for segment in segments], PATCH).tokens
    for other in (*others, faster):
        assert (net(other, text, packing) - out).abs().max() > 1e-4
    assert (net(tokens, text + 1, packing) - out).abs().max() > 1e-4


@pytest.mark.parametrize("shapes", [SHAPES, EQUAL])
def test_rows_of_one_level_equal_a_level_a_clip(shapes: list[tuple[int, ...]]) -> None:
    net, segments = build(pooled_text=True), clips(shapes)
    text, packing = texts(3)
    tokens = flatten([[segment] for segment in segments], PATCH).tokens
    rows = tokens.packing.owner()
    doubled = Tokens(
        tokens.values,
        tokens.coords,
        tokens.flags,
        tokens.packing,
        tokens.sigma.repeat(2),
        tokens.row_clips.repeat(2),
        rows + 3 * (torch.arange(len(rows)) % 2),
    )
    torch.testing.assert_close(net(doubled, text, packing), net(tokens, text, packing), atol=1e-5, rtol=1e-4)


def test_bf16_autocast_stays_close_and_keeps_modulation_in_fp32() -> None:
    net, segments = build(), clips(EQUAL)
    text, packing = texts(3)
    exact = run(net, segments, text, packing)
    seen: list[torch.dtype] = []
    net.condition.register_forward_hook(lambda *args: seen.append(args[-1].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        rough = run(net, segments, text, packing)
    assert seen == [torch.float32]
    assert (rough.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


def test_settings_that_cannot_work_are_refused() -> None:
    for wrong in ({"num_heads": 3}, {"activation": "elu"}, {"rope_time": "frames"}, {"num_heads": 16}):
        with pytest.raises(ValueError):
            build(**wrong)
