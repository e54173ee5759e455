"""Promises of the adversary's state and of the guard, without any training."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor, nn

from soratrain.batch import VideoBatch
from soratrain.errors import ConfigError, DivergedError
from soratrain.models.discriminator import PatchDiscriminator
from soratrain.stages.guard import StepGuard
from soratrain.stages.vae_adversary import Adversary, CollapseWatch

NET = partial(PatchDiscriminator, channels=[4, 4], time_strides=[1, 1])


def batch_of(*weights: float) -> VideoBatch:
    count = len(weights)
    return VideoBatch(
        keys=("",) * count,
        captions=("",) * count,
        fps=torch.ones(count),
        weights=torch.tensor(weights),
        draws=torch.arange(count),
        scale=1.0,
        video=torch.zeros(count, 1, 16, 16, 3, dtype=torch.uint8),
    )


class Levels(nn.Module):
    """A discriminator whose logit is a multiple of the mean of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.gain * x.mean(dim=(1, 2, 3, 4), keepdim=True)


def play(adversary: Adversary, disc: nn.Module, decoder: Tensor, x: Tensor) -> dict[str, Tensor]:
    """Let a decoder of one weight, `y = decoder · 1`, be judged once; return what is reported."""
    y = decoder * torch.ones_like(x)
    _, told = adversary.differentiate(
        disc,
        batch_of(*[1 / len(x)] * len(x)),
        x,
        y,
        lambda shown: (shown - x).square().mean(),
        rest=torch.zeros(()),
        last=decoder,
        ramp=1.0,
        share=1.0,
    )
    return told


def test_the_balance_and_both_gradients_equal_those_by_hand() -> None:
    adversary, disc = Adversary(net=NET, weight=0.5, lecam=0.0, warmup=0.0), Levels()
    decoder, x = torch.tensor(0.1, requires_grad=True), torch.full((2, 3, 1, 4, 4), 0.3)
    told = play(adversary, disc, decoder, x)
    slope = 2 * (0.1 - 0.3)  # of the mean square by the decoder's weight; that of -2y is -2
    assert told["d_weight"] == 0 and float(decoder.grad) == pytest.approx(slope)
    # d_loss is (1 - 2·0.3)/2 + (1 + 2·0.1)/2, whose slope by the gain is (0.1 - 0.3)/2
    assert float(told["d_loss"]) == pytest.approx(0.8) and float(disc.gain.grad) == pytest.approx(-0.1)
    adversary.end_step(1, learn=True)
    assert float(adversary.scale) == pytest.approx(abs(slope) / 2)
    assert adversary.means.tolist() == pytest.approx([0.6, 0.2])
    decoder.grad = None
    told = play(adversary, disc, decoder, x)
    weight = 0.5 * abs(slope) / 2
    assert float(told["d_weight"]) == pytest.approx(weight)
    assert float(decoder.grad) == pytest.approx(slope - 2 * weight)


def test_the_discriminator_gets_no_gradient_from_the_decoder_s_loss_nor_the_decoder_from_its() -> None:
    decoder, x = torch.tensor(0.1, requires_grad=True), torch.full((1, 3, 1, 4, 4), 0.3)
    fixed, disc = Adversary(net=NET, weight=1.0, adaptive=False, lecam=0.0), Levels()
    play(fixed, disc, decoder, x)
    assert float(disc.gain.grad) == pytest.approx(-0.1)  # the hinge's alone: of -D(y) it would be -0.1 more
    assert float(decoder.grad) == pytest.approx(2 * (0.1 - 0.3) - 2.0)  # of hinge(y) it would be 1 more


def test_running_means_begin_with_the_first_step_and_a_skipped_step_teaches_nothing() -> None:
    adversary, disc = Adversary(net=NET, decay=0.9), Levels()
    decoder, x = torch.tensor(0.1, requires_grad=True), torch.full((1, 3, 1, 4, 4), 0.3)
    assert float(play(adversary, disc, decoder, x)["lecam"]) == 0  # there is no mean yet
    adversary.end_step(1, learn=True)
    told = play(adversary, disc, decoder, 2 * x)
    assert float(told["lecam"]) == pytest.approx((1.2 - 0.2) ** 2 + (0.6 - 0.2) ** 2)
    before = {name: value.clone() for name, value in adversary.state_dict().items()}
    adversary.end_step(2, learn=False)
    assert all(torch.equal(value, before[name]) for name, value in adversary.state_dict().items())
    play(adversary, disc, decoder, 2 * x)
    adversary.end_step(3, learn=True)
    assert adversary.means.tolist() == pytest.approx([0.9 * 0.6 + 0.1 * 1.2, 0.2])


def test_the_weight_is_none_before_the_start_and_grows_to_its_full_size() -> None:
    adversary = Adversary(net=NET, start=0.1, warmup=0.2)
    assert [adversary.ramp(step, 100) for step in (0, 9)] == [0, 0]
    assert [adversary.ramp(step, 100) for step in (10, 19, 29, 99)] == pytest.approx([0.05, 0.5, 1, 1])
    assert Adversary(net=NET, start=0.0, warmup=0.0).ramp(0, 100) == 1


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ([0.01, 0.9, 2.0, -2.0], "has won"),
        ([0.3, 0.999, 0.9, -0.9], "has won"),
        ([1.0, 0.5, 0.3, 0.295], "tells nothing apart"),
        ([0.8, 0.6, 0.2, -0.1], ""),
    ],
)
def test_a_collapse_is_warned_of_in_one_line_with_step_and_figures(
    figures: list[float], said: str, caplog: pytest.LogCaptureFixture
) -> None:
    watch = CollapseWatch(10)
    with caplog.at_level("WARNING", logger="soratrain"):
        for step in range(1, 31):
            watch.add(torch.tensor(figures), step)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == bool(said)
    if said:
        assert said in lines[0] and lines[0].startswith("step 10: ") and f"d_loss {figures[0]:.3g}" in lines[0]
        assert f"real {figures[2]:.3g}" in lines[0] and "\n" not in lines[0]


def test_a_collapse_that_comes_back_is_said_again(caplog: pytest.LogCaptureFixture) -> None:
    watch = CollapseWatch(1)
    with caplog.at_level("WARNING", logger="soratrain"):
        for step, loss in enumerate((0.01, 0.01, 0.8, 0.01)):
            watch.add(torch.tensor([loss, 0.7, 0.5, -0.5]), step)
    assert [record.getMessage()[:6] for record in caplog.records] == ["step 0", "step 3"]


def test_the_guard_counts_in_a_row_and_stops_above_its_limit() -> None:
    guard, nan = StepGuard(2), float("nan")
    values = [torch.tensor([1.0, 2.0]), torch.tensor([nan, 2.0]), torch.tensor([1.0, float("inf")])]
    assert guard.spoilt(values) == [False, True, True]
    for step, skipped in enumerate((["it"], ["it"], [], ["it"], ["it"])):
        guard.count(skipped, step)
    with pytest.raises(DivergedError, match=r"of it is no number at step 7, the 3\. step in a row"):
        guard.count(["it"], 7)
    with pytest.raises(DivergedError, match="step 1"):
        StepGuard(0).count(["it"], 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"weight": -1.0}, "adversary.weight"), ({"decay": 1.0}, "adversary.decay"), ({"window": 0}, "adversary.window")],
)
def test_settings_that_cannot_work_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Adversary(net=NET, **options)
    with pytest.raises(ConfigError, match="max_bad_steps=-1"):
        StepGuard(-1)
    with pytest.raises(ConfigError, match="discriminator: channels"):
        PatchDiscriminator(channels=[8], time_strides=[1, 1])
