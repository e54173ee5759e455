"""What the optimizers and the schedule promise."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError
from soratrain.muon import Muon, orthogonalize, parts_of
from soratrain.optim import OptimizerFactory, Schedule


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes: tuple[int, ...]) -> list[tuple[str, nn.Parameter]]:
    named = []
    for index, shape in enumerate(shapes):
        param = nn.Parameter(random(*shape, seed=index))
        param.grad = random(*shape, seed=100 + index)
        named.append((f"p{index}", param))
    return named


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 16, 20), (2, 16, 100)])
def test_orthogonalize_keeps_singular_vectors_and_levels_singular_values(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    count, n, m = shape
    left = torch.linalg.qr(random(count, n, n))[0]
    right = torch.linalg.qr(random(count, m, n, seed=1))[0]
    matrices = left @ torch.diag(torch.logspace(0, -2, n)) @ right.mT
    result = orthogonalize(matrices, dtype).float()
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.8 and values.max() < 1.2
    level = left.mT @ result @ right  # diagonal where the singular vectors are kept
    # a Gram matrix squares the condition number, here 100, and with it what fp32 rounds away
    allowed = torch.finfo(dtype).eps * 100**2 if dtype.itemsize == 4 else 0.1
    assert (level - torch.diag_embed(level.diagonal(dim1=1, dim2=2))).abs().max() < allowed


def test_the_gram_route_equals_the_direct_one() -> None:
    wide = random(2, 8, 64)
    padded = torch.cat([wide, torch.zeros(2, 56, 64)], dim=1)  # square: the direct route; zero rows change nothing
    torch.testing.assert_close(orthogonalize(wide), orthogonalize(padded)[:, :8], rtol=1e-3, atol=1e-4)


def test_zero_gradients_stay_zero() -> None:
    assert torch.equal(orthogonalize(torch.zeros(1, 4, 8)), torch.zeros(1, 4, 8))


def test_a_muon_update_has_the_rms_of_an_adamw_update_whatever_the_shape() -> None:
    named = parameters((8, 32), (32, 8), (16, 4, 3, 3), (16, 16))
    before = [param.detach().clone() for _, param in named]
    OptimizerFactory(name="muon", lr=0.1, weight_decay=0.0)(named).step()
    for (_, param), old in zip(named, before, strict=True):
        rms = (param - old).square().mean().sqrt() / 0.1
        # an orthogonal [n, m] has RMS 1/sqrt(max(n, m)), and the scale is 0.2·sqrt(max(n, m))
        assert 0.15 < rms < 0.25, (param.shape, rms)


def test_muon_moves_each_matrix_as_if_it_were_alone_in_any_orientation() -> None:
    together = parameters((6, 20), (20, 6), (6, 20))
    OptimizerFactory(name="muon", lr=0.1)(together).step()
    for index, shape in enumerate([(6, 20), (20, 6), (6, 20)]):
        alone = parameters((6, 20), (20, 6), (6, 20))[index : index + 1]
        OptimizerFactory(name="muon", lr=0.1)(alone).step()
        torch.testing.assert_close(together[index][1], alone[0][1], rtol=1e-5, atol=1e-6)
        assert alone[0][1].shape == shape


def test_muon_in_blocks_makes_each_part_of_a_matrix_orthogonal_by_itself() -> None:
    assert [parts_of(rows, 4) for rows in (4, 8, 6, 7)] == [1, 2, 2, 7]
    assert parts_of(1000, 0) == 1
    for shape in ((8, 32), (32, 8)):
        named = parameters(shape)
        before = named[0][1].detach().clone()
        OptimizerFactory(name="muon", lr=1.0, block=4)(named).step()
        update = before - named[0][1].detach()
        for part in (update if shape[0] == 8 else update.mT).split(4):
            values = torch.linalg.svdvals(part) / (0.2 * math.sqrt(32))
            assert values.min() > 0.85 and values.max() < 1.15


def test_muon_descends_along_the_orthogonalized_nesterov_momentum() -> None:
    param = nn.Parameter(torch.zeros(4, 6))
    optimizer = Muon([{"params": [param], "matrix": True}], lr=1.0, momentum=0.9, weight_decay=0.0)
    momentum = torch.zeros(4, 6)
    for step in range(3):
        param.grad = random(4, 6, seed=step)
        before = param.detach().clone()
        optimizer.step()
        momentum = 0.9 * momentum + 0.1 * param.grad
        direction = 0.1 * param.grad + 0.9 * momentum
        u, _, v = torch.linalg.svd(direction, full_matrices=False)
        update = (before - param.detach()) / (0.2 * math.sqrt(6))
        assert (update * (u @ v)).sum() / update.norm() / (u @ v).norm() > 0.99


def test_adamw_and_the_vectors_under_muon_equal_torch_adamw() -> None:
    ours, theirs = parameters((5,), (7,)), parameters((5,), (7,))
    first = OptimizerFactory(name="muon", lr=0.01, betas=(0.9, 0.95), eps=1e-8)(ours)
    second = torch.optim.AdamW([param for _, param in theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    for _ in range(3):
        first.step()
        second.step()
    for (_, one), (_, other) in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_weights_decay_and_vectors_do_not() -> None:
    for name in ("adamw", "muon"):
        named = parameters((4, 4), (4,))
        for _, param in named:
            assert param.grad is not None
            param.grad.zero_()
        before = [param.detach().clone() for _, param in named]
        OptimizerFactory(name=name, lr=0.1, weight_decay=0.5)(named).step()
        torch.testing.assert_close(named[0][1].detach(), before[0] * (1 - 0.1 * 0.5))
        assert torch.equal(named[1][1].detach(), before[1])


def test_a_parameter_can_opt_out_of_muon_and_frozen_ones_are_left_out() -> None:
    named = parameters((4, 4), (4, 4), (4, 4))
    named[1][1].no_muon = True
    named[2][1].requires_grad_(False)
    groups = OptimizerFactory(name="muon")(named).param_groups
    assert [(group["matrix"], len(group["params"])) for group in groups] == [(True, 1), (False, 1)]
    assert groups[1]["weight_decay"] > 0 or OptimizerFactory().weight_decay == 0
    with pytest.raises(ConfigError, match="nothing to optimize"):
        OptimizerFactory()(named[2:])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "sgd"}, "optimizer.name='sgd' is unknown; use adamw or muon"),
        ({"lr": -1.0}, "optimizer.lr=-1.0"),
        ({"lr": float("nan")}, "optimizer.lr=nan"),
        ({"betas": (0.9,)}, "optimizer.betas"),
        ({"betas": (0.9, 1.0)}, "optimizer.betas"),
        ({"momentum": 1.0}, "optimizer.momentum"),
    ],
)
def test_bad_optimizer_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimizerFactory(**settings)


def test_the_schedule_warms_up_to_one_and_ends_at_its_final_value() -> None:
    for name in ("cosine", "wsd"):
        schedule = Schedule(name=name, warmup_steps=4, final=0.25)
        factors = [schedule(step, 20) for step in range(20)]
        assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
        assert factors[-1] == pytest.approx(0.25)
        assert all(after <= before + 1e-12 for before, after in pairwise(factors[4:]))
    assert Schedule(name="constant", warmup_steps=0)(1000, 20) == 1.0


def test_cosine_is_half_way_at_half_time_and_wsd_is_flat_until_its_decay() -> None:
    assert Schedule(name="cosine", warmup_steps=0, final=0.0)(50, 101) == pytest.approx(0.5)
    wsd = Schedule(name="wsd", warmup_steps=0, final=0.0, decay=0.5)
    assert wsd(49, 101) == 1.0
    assert wsd(75, 101) == pytest.approx(0.5, abs=0.02)


def test_a_run_shorter_than_its_warm_up_or_prolonged_stays_in_range() -> None:
    for name in ("cosine", "wsd", "constant"):
        schedule = Schedule(name=name, warmup_steps=100)
        assert all(0 < schedule(step, 3) <= 1 for step in range(3))
        assert all(0 <= schedule(step, 300) <= 1 for step in range(310))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "step"}, "schedule.name='step' is unknown"),
        ({"warmup_steps": -1}, "schedule.warmup_steps=-1"),
        ({"final": 2.0}, "schedule.final=2.0"),
        ({"decay": 0.0}, "schedule.decay=0.0"),
    ],
)
def test_bad_schedule_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Schedule(**settings)
