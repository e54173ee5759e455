"""Tiny random VAEs of other people, saved by diffusers itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, AutoencoderKLWan

WAN: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
WAN22: dict[str, Any] = {
    **{**WAN, "z_dim": 6, "decoder_base_dim": 8},
    **{"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16},
}
COGVIDEOX: dict[str, Any] = {
    "block_out_channels": (8, 8, 8, 8),
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 2,
    "scaling_factor": 0.7,
}


def statistics(channels: int) -> dict[str, list[float]]:
    """Return a mean and a deviation for each channel, all different."""
    return {
        "latents_mean": [0.1 * (index + 1) for index in range(channels)],
        "latents_std": [0.5 + 0.25 * index for index in range(channels)],
    }


def make(form: str, seed: int = 0) -> Any:
    """Return a random VAE of a form: `wan`, `wan22` or `cogvideox`."""
    torch.manual_seed(seed)
    if form == "cogvideox":
        return AutoencoderKLCogVideoX(**COGVIDEOX).eval()
    options = WAN if form == "wan" else WAN22
    return AutoencoderKLWan(**options, **statistics(options["z_dim"])).eval()


def save(form: str, folder: Path, seed: int = 0) -> Any:
    """Save a random VAE into `folder` and return it."""
    net = make(form, seed)
    net.save_pretrained(folder)
    return net
