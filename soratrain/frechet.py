"""The Fréchet distance between features of clips (FVD: Unterthiner et al., 2018), and the network that gives them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from soratrain.errors import ConfigError, DataError


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return |μx − μy|² + tr(Σx + Σy − 2(ΣxΣy)^½) of two sets of features `[N, D]`, in fp64.

    The trace of the root is that of (Σx^½ Σy Σx^½)^½, whose argument is symmetric, so that no complex root comes in.
    Covariances are divided by N − 1.

    Raises:
        DataError: fewer than two clips.
    """
    if min(len(x), len(y)) < 2:
        raise DataError(f"a covariance needs at least two clips, and here are {min(len(x), len(y))}")
    x, y = x.double(), y.double()
    shift = (x.mean(0) - y.mean(0)).square().sum()
    first, second = (torch.cov(features.T).reshape(features.shape[1], -1) for features in (x, y))
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    both = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((shift + first.trace() + second.trace() - 2 * both).clamp(min=0))


class ClipFeatures:
    """Features of clips by a TorchScript file with the face of StyleGAN-V's `i3d_torchscript.pt`.

    It is called with fp32 `[B, 3, T, H, W]` in [0, 255] and `rescale=True, resize=True, return_features=True`: it
    brings them to [-1, 1] and 224 × 224 itself.

    Args:
        file: path of the TorchScript.
        frames: the first so many frames of a clip are taken; shorter clips have no features.

    Raises:
        ConfigError: too few frames.
        DataError: the file cannot be loaded.
    """

    def __init__(self, file: str, frames: int, device: torch.device) -> None:
        if frames < 9:
            raise ConfigError(f"fvd.frames={frames}: I3D halves time three times and needs at least 9; use 16")
        if not Path(file).is_file():
            raise DataError(f"fvd.i3d={file}: there is no such file; give a TorchScript such as i3d_torchscript.pt")
        try:
            self.net = torch.jit.load(file, map_location=device).eval()
        except RuntimeError as error:
            raise DataError(f"fvd.i3d={file}: is not a TorchScript ({str(error).splitlines()[0]})") from error
        self.frames, self.device = frames, device

    @torch.no_grad()
    def __call__(self, clip: Tensor) -> Tensor:
        """Return the features `[D]`, fp32 on the CPU, of a uint8 clip `[T, H, W, 3]`."""
        pixels = clip[: self.frames].permute(3, 0, 1, 2)[None].float().to(self.device)
        return self.net(pixels, rescale=True, resize=True, return_features=True).flatten().float().cpu()
