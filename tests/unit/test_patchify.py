"""Promises of cutting latents into tokens."""

from __future__ import annotations

import pytest
import torch

from soratrain.models.patchify import coordinates, grid_of, patchify, patchify_target, unpatchify

PATCH = (1, 2, 2)


def test_tokens_run_in_raster_order_and_channels_as_wan_lays_them() -> None:
    latent = torch.arange(3 * 2 * 4 * 6).reshape(3, 2, 4, 6)
    tokens, targets = patchify(latent, PATCH), patchify_target(latent, PATCH)
    assert tokens.shape == targets.shape == (2 * 2 * 3, 12)
    corner = latent[:, 1, 2:4, 4:6]  # the last token: t=1, y=1, x=2
    assert torch.equal(tokens[-1], corner.reshape(-1)) and torch.equal(targets[-1], corner.permute(1, 2, 0).reshape(-1))
    assert torch.equal(tokens[1], latent[:, 0, 0:2, 2:4].reshape(-1))


@pytest.mark.parametrize("patch", [(1, 1, 1), (1, 2, 2), (2, 1, 3)])
def test_targets_and_latents_round_trip(patch: tuple[int, int, int]) -> None:
    latent = torch.randn(3, 4, 4, 6)
    assert torch.equal(unpatchify(patchify_target(latent, patch), grid_of(latent, patch), patch), latent)


def test_a_latent_that_is_no_whole_number_of_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="1x3x4"):
        patchify(torch.zeros(2, 1, 3, 4), PATCH)


def test_time_is_in_latent_steps_at_24_frames_a_second_and_space_in_tokens() -> None:
    places = coordinates((3, 2, 2), PATCH, 24.0, (0.0, 0.0, 0.0), "seconds")
    assert places[:, 0].tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4
    assert places[:4, 1:].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    slow = coordinates((3, 1, 1), PATCH, 8.0, (0.5, 1.0, 2.0), "seconds")
    assert slow.tolist() == [[3.0, 1.0, 2.0], [6.0, 1.0, 2.0], [9.0, 1.0, 2.0]]
    assert coordinates((3, 1, 1), PATCH, 8.0, (0.0, 0.0, 0.0), "index")[:, 0].tolist() == [0.0, 1.0, 2.0]
