"""Promises of the rotary embedding on float coordinates."""

from __future__ import annotations

import pytest
import torch

from soratrain.models.rope import rotate, rotations, split_axes


def scores(coords: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(len(coords), 1, 24, generator=generator) for _ in range(2))
    rotation = rotations(coords, split_axes(24))
    return torch.einsum("nhk,mhk->nm", rotate(q, rotation), rotate(k, rotation))


def test_a_shift_of_all_coordinates_changes_no_score_and_a_swap_of_axes_does() -> None:
    coords = torch.rand(7, 3, generator=torch.Generator().manual_seed(1)) * 5
    shift = torch.tensor([3.25, -2.0, 11.5])
    torch.testing.assert_close(scores(coords + shift), scores(coords), atol=2e-4, rtol=1e-4)
    assert (scores(coords[:, [0, 2, 1]]) - scores(coords)).abs().max() > 0.1


def test_coordinate_zero_is_the_identity_and_lengths_are_kept() -> None:
    x = torch.randn(4, 2, 24)
    assert torch.equal(rotate(x, rotations(torch.zeros(4, 3), split_axes(24))), x)
    turned = rotate(x, rotations(torch.rand(4, 3) * 9, split_axes(24)))
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))


def test_the_fastest_pair_turns_one_radian_a_unit() -> None:
    rotation = rotations(torch.tensor([[1.0]]), (8,))
    torch.testing.assert_close(torch.atan2(*rotation[0, 0, 0].flip(0)), torch.tensor(1.0))


def test_the_axes_share_the_head_and_impossible_sizes_are_refused() -> None:
    assert split_axes(128) == (44, 42, 42)
    with pytest.raises(ValueError, match="not 7"):
        split_axes(7)
