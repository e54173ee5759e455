"""Promises of the layouts of the ways to sample, and of rolling through clips of any length."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from soratrain.diffusion import generator as module
from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.rolling import backwards, forwards
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.segments import flatten
from soratrain.diffusion.ways import Layout, bridging, following, known_positions, leading, over, within
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT

PATCH = (1, 2, 2)


def latent(steps: int, seed: int = 0) -> Tensor:
    """Return a latent of one token a step."""
    return torch.randn(4, steps, 2, 2, generator=torch.Generator().manual_seed(seed))


def seen(layout: Layout, sigma: float = 0.7, rope_time: str = "seconds") -> list[tuple[float, int, float]]:
    """Return time, flags and noise level of every token, as the net is given them."""
    tokens = flatten([layout.segments(latent(layout.shape[1]), sigma, PATCH, rope_time)], PATCH, rope_time).tokens
    levels = tokens.sigma[torch.zeros(len(tokens.flags), dtype=torch.int64) if tokens.rows is None else tokens.rows]
    return [
        (round(t, 4), f, round(s, 4))
        for t, f, s in zip(tokens.coords[:, 0].tolist(), tokens.flags.tolist(), levels.tolist(), strict=True)
    ]


def test_segments_stand_where_a_hand_computes_them() -> None:
    """At 8 frames a second a latent is 0.5 s, 3 units of time; flag 1 is given, 2 begins standalone."""
    clean, noisy = 0.0, 0.7
    after = following(latent(2), 2, 8.0, standalone=True)
    assert seen(after) == [(0, 3, clean), (3, 1, clean), (6, 0, noisy), (9, 0, noisy)]
    assert seen(following(latent(2), 1, 8.0, standalone=False))[0] == (0, 1, clean)
    # noisy latents 0…2 show frames 0…8; the suffix begins at frame 8 again
    before = leading(latent(2), 2, 8.0)
    assert before.shape == (4, 3, 2, 2)
    assert seen(before) == [(0, 2, noisy), (3, 0, noisy), (6, 0, noisy), (6, 3, clean), (9, 1, clean)]
    # the prefix shows frame 0, noisy latents stand at 4 and 8, so the suffix begins at 8
    bridge = bridging(latent(1), 2, latent(1), 8.0, standalone=True)
    assert seen(bridge) == [(0, 3, clean), (3, 0, noisy), (6, 0, noisy), (6, 3, clean)]
    assert [time for time, _, _ in seen(bridge, rope_time="index")] == [0, 1, 2, 2]
    finer = over(latent(2), 16.0, [latent(1), latent(1), latent(1)], every=2)
    assert seen(finer) == [(0, 3, clean), (0.75, 3, clean), (1.5, 3, clean), (0, 2, noisy), (1.5, 0, noisy)]


def test_tokens_outside_a_mask_are_given_at_no_noise() -> None:
    known = torch.zeros(2, 2, 4, dtype=torch.bool)
    known[:, :, 2:] = True
    layout = within(torch.randn(4, 2, 2, 4), known, 8.0)
    pack = flatten([layout.segments(torch.randn(4, 2, 2, 4), 0.5, PATCH, "seconds")], PATCH)
    assert pack.tokens.flags.tolist() == [2, 3, 0, 1]
    assert pack.tokens.rows is not None
    assert pack.tokens.sigma[pack.tokens.rows].tolist() == [0.5, 0.0, 0.5, 0.0]


def test_a_position_is_known_where_no_pixel_of_its_token_is_drawn_anew() -> None:
    redrawn = torch.zeros(9, 32, 48, dtype=torch.bool)
    redrawn[5, 20, 17] = True  # frame 5 is of latent 2 (frames 5 to 8), the pixel of token (1, 1)
    known = known_positions(redrawn, (4, 8, 8), PATCH)
    assert known.shape == (3, 4, 6)
    assert (~known).nonzero().tolist() == [[2, row, column] for row in (2, 3) for column in (2, 3)]
    redrawn[5], redrawn[0, 0, 0] = False, True  # frame 0 is all of latent 0
    known = known_positions(redrawn, (4, 8, 8), PATCH)
    assert not known[0, :2, :2].any() and known[1:].all() and known[0, 2:].all()
    wider = known_positions(redrawn, (4, 8, 8), PATCH, margin=1)
    assert not wider[:2, :4, :4].any() and wider[2].all() and wider[:, :, 4:].all()


def recorder(layouts: list[Layout], names: list[str]) -> Callable[[Layout, str], Tensor]:
    def draw(layout: Layout, name: str) -> Tensor:
        layouts.append(layout)
        names.append(name)
        return latent(layout.shape[1], seed=len(layouts))

    return draw


@pytest.mark.parametrize("steps", [1, 3, 4, 50])
def test_rolling_forwards_adds_what_is_asked_for_and_no_forward_is_larger_than_a_window(steps: int) -> None:
    layouts: list[Layout] = []
    names: list[str] = []
    tail = latent(2)
    drawn = list(forwards(recorder(layouts, names), tail, steps, 8.0, window=5, context=2, standalone=True))
    assert sum(part.shape[1] for part in drawn) == steps and len(set(names)) == len(names)
    assert max(layout.positions for layout in layouts) <= 5 * 4
    there = torch.cat((tail, *drawn), dim=1)
    count = 2
    for number, layout in enumerate(layouts):
        (given,) = layout.before
        assert torch.equal(given.latent, there[:, count - 2 : count]) and given.standalone == (number == 0)
        assert layout.frame == 8 and not layout.standalone
        count += layout.shape[1]


@pytest.mark.parametrize("steps", [1, 3, 4, 50])
def test_rolling_backwards_takes_the_beginning_of_each_window_as_it_was_drawn(steps: int) -> None:
    layouts: list[Layout] = []
    names: list[str] = []
    head = latent(2)
    drawn = list(backwards(recorder(layouts, names), head, steps, 8.0, window=5, context=2))
    assert sum(part.shape[1] - 1 for part in drawn) == steps and len(set(names)) == len(names)
    assert max(layout.positions for layout in layouts) <= 6 * 4
    for layout, before in zip(layouts, [head, *drawn], strict=False):
        (given,) = layout.after
        assert torch.equal(given.latent, before[:, :2]) and given.standalone
        assert given.frame == 4 * (layout.shape[1] - 1) and layout.standalone and layout.frame == 0


class Texts(torch.nn.Module):
    """A text encoder that knows the length of a prompt."""

    def tokenize(self, prompts: list[str]) -> list[str]:
        return prompts

    def forward(self, prompts: list[str]) -> tuple[Tensor, Packing]:
        return torch.tensor([[float(len(text) + 1)] * 8 for text in prompts]), Packing.of([1] * len(prompts))


def generator(precision: str = "32-true") -> Generator:
    torch.manual_seed(0)
    net = DiT(channels=4, dim=32, depth=1, num_heads=2, text_dim=8).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return Generator(None, net, Texts(), objective=Flow(), precision=precision)  # type: ignore[arg-type]


LAYOUTS = {
    "text": Layout((4, 2, 2, 4), 8.0),
    "after": following(torch.randn(4, 2, 2, 4), 2, 8.0, standalone=True),
    "before": leading(torch.randn(4, 2, 2, 4), 2, 8.0),
    "between": bridging(torch.randn(4, 1, 2, 4), 2, torch.randn(4, 2, 2, 4), 8.0, standalone=True),
    "inside": within(torch.randn(4, 2, 2, 4), torch.tensor([0, 0, 1, 1]).bool().expand(2, 2, 4), 8.0),
    "over": over(torch.randn(4, 2, 2, 4), 8.0, [torch.randn(4, 1, 2, 4)] * 3, 2),
}


def test_the_shift_follows_the_tokens_of_the_clip_as_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that two stretches show, or a known picture among those drawn, makes no clip longer."""
    seen: list[int] = []
    grid = Flow.grid
    monkeypatch.setattr(
        Flow, "grid", lambda self, steps, tokens, start: seen.append(tokens) or grid(self, steps, tokens)
    )
    for way, latents in {"text": 2, "after": 4, "before": 4, "between": 4, "inside": 2, "over": 2}.items():
        assert LAYOUTS[way].duration == latents
        generator().draw([LAYOUTS[way]], ["a"], [1], Sampler(steps=1))
        assert set(seen) == {latents * 2}  # 2 x 4 positions a frame, 4 a token
        seen.clear()


@pytest.mark.parametrize("way", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_sample_is_the_same_alone_and_among_others(way: str, scale: float) -> None:
    generate, sampler, prompts = generator(), Sampler(steps=3, guidance_scale=scale), ["a", "bb", "ccc", "dddd"]
    layouts, draws = [LAYOUTS[way]] * 4, [11, 22, 33, 44]
    together = generate.draw(layouts, prompts, draws, sampler, strength=0.7)
    for number, drawn in enumerate(together):
        alone = generate.draw(layouts[:1], [prompts[number]], [draws[number]], sampler, strength=0.7)
        torch.testing.assert_close(alone[0], drawn, atol=1e-4, rtol=1e-4)
    assert (together[0] - together[1]).abs().max() > 0.1


@pytest.mark.parametrize("way", ["after", "before", "between", "over"])
def test_what_is_given_alters_what_is_drawn(way: str) -> None:
    generate, sampler, layout = generator(), Sampler(steps=2), LAYOUTS[way]
    drawn = generate.draw([layout], ["a"], [1], sampler)
    parts = {"before": layout.before, "after": layout.after}
    for side, given in parts.items():
        for number in range(len(given)):
            other = list(given)
            other[number] = type(given[number])(-given[number].latent, given[number].frame, given[number].standalone)
            changed = Layout(**{**vars(layout), side: tuple(other)})
            assert (generate.draw([changed], ["a"], [1], sampler) - drawn).abs().max() > 1e-3


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_known_positions_come_back_to_the_bit_and_alter_the_rest(precision: str) -> None:
    generate, sampler, layout = generator(precision), Sampler(steps=4), LAYOUTS["inside"]
    assert layout.base is not None and layout.known is not None
    (drawn,) = generate.draw([layout], ["a"], [1], sampler)
    assert torch.equal(drawn[:, layout.known], layout.base[:, layout.known])
    assert not torch.isclose(drawn[:, ~layout.known], layout.base[:, ~layout.known]).any()
    other = within(torch.where(layout.known, -layout.base, layout.base), layout.known, 8.0)
    (changed,) = generate.draw([other], ["a"], [1], sampler)
    assert (changed - drawn)[:, ~layout.known].abs().max() > 1e-3


@pytest.mark.parametrize("way", ["text", "inside"])
def test_guidance_leads_from_the_empty_prompt_to_the_prompt(way: str) -> None:
    generate, layouts = generator(), [LAYOUTS[way]] * 2

    def drawn(scale: float, *prompts: str) -> Tensor:
        return generate.draw(layouts, prompts, [1, 2], Sampler(steps=1, guidance_scale=scale))

    prompt, empty = drawn(1.0, "a cat", "two dogs"), drawn(1.0, "", "")
    torch.testing.assert_close(drawn(0.0, "a cat", "two dogs"), empty)
    torch.testing.assert_close(drawn(3.0, "a cat", "two dogs"), empty + 3 * (prompt - empty), atol=1e-3, rtol=1e-3)
    assert (prompt - empty).abs().max() > 0.1


def test_each_window_has_noise_of_its_own_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    generate, streams = generator(), list[tuple[int, str]]()
    generate.objective = DDPM()
    normal = module.keyed_normal
    monkeypatch.setattr(
        module, "keyed_normal", lambda draw, name, *rest: streams.append((draw, name)) or normal(draw, name, *rest)
    )
    for name in ("noise", "window 1", "window 10"):
        generate.draw([LAYOUTS["text"]] * 2, ["a", "b"], [1, 2], Sampler(name="ancestral", steps=12), name=name)
    assert len(set(streams)) == len(streams) == 3 * 2 * 12  # the first noise, and one of each step but the last


def test_rescaled_guidance_heeds_what_is_drawn_alone() -> None:
    """Of known positions the net has learned to predict nothing, so what it says there must not matter."""
    generate, layout = generator(), LAYOUTS["inside"]
    plain, sampler = generate._predict, Sampler(steps=2, guidance_scale=5.0, guidance_rescale=0.7)
    (drawn,) = generate.draw([layout], ["a"], [1], sampler)
    assert layout.known is not None
    generate._predict = lambda *given: torch.where(layout.known, 1e3, plain(*given))  # type: ignore[method-assign]
    (other,) = generate.draw([layout], ["a"], [1], sampler)
    assert torch.equal(other, drawn)


def test_the_less_the_strength_the_more_of_the_base_stays() -> None:
    generate, layout = generator(), over(torch.randn(4, 2, 2, 4), 8.0)
    assert layout.base is not None
    far = [
        (generate.draw([layout], ["a"], [1], Sampler(steps=10), strength=strength)[0] - layout.base).abs().mean()
        for strength in (0.1, 0.5, 1.0)
    ]
    assert far[0] < far[1] < far[2]
    pure = Layout(layout.shape, 8.0)
    assert torch.equal(
        generate.draw([layout], ["a"], [1], Sampler(steps=3)), generate.draw([pure], ["a"], [1], Sampler(steps=3))
    )
