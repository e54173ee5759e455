"""How near pictures are to those that they should be: PSNR and SSIM, one number a frame.

Both are of 8-bit RGB, as stored and shown. A frame without any error would have an infinite PSNR, which no mean
survives: it counts as BEST.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure

from soratrain.batch import to_pixels

BEST = 100.0  # dB; one grey level of error in one value of a 1080p frame has 116 dB, in 2 % of all values 65 dB
WINDOW, SIGMA = 11, 1.5  # of SSIM's gaussian (Wang et al., 2004)
AT_ONCE = 1 << 19  # pixels: SSIM keeps five window sums of each, and a network that judges far more


def psnr(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the peak signal-to-noise ratio of each frame in dB, `[N]`, of uint8 `[N, H, W, 3]`; at most BEST."""
    error = (original.double() - rebuilt.double()).square().flatten(1).mean(1)
    return (10 * torch.log10(255.0**2 / error)).clamp(max=BEST)


def ssim(original: Tensor, rebuilt: Tensor) -> Tensor:
    """Return the structural similarity of each frame, `[N]`, of uint8 `[N, H, W, 3]`, sides of at least WINDOW.

    Wang et al. (2004) with their constants, on R, G and B alike, averaged over the places at which the whole window
    lies inside the picture.
    """
    edge = WINDOW // 2
    found = []
    for x, y in parts(original, rebuilt):
        x, y = (frames.permute(0, 3, 1, 2).float() / 255 for frames in (x, y))
        image = structural_similarity_index_measure(
            y, x, sigma=SIGMA, kernel_size=WINDOW, data_range=1.0, reduction="none", return_full_image=True
        )[1]
        found.append(image[..., edge:-edge, edge:-edge].flatten(1).mean(1))
    return torch.cat(found)


def parts(original: Tensor, rebuilt: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `[N, H, W, 3]` of both sides in parts of at most AT_ONCE pixels, or single frames."""
    size = max(1, AT_ONCE // (original.shape[1] * original.shape[2]))
    yield from zip(original.split(size), rebuilt.split(size), strict=True)


def perceptual(net: nn.Module, original: Tensor, rebuilt: Tensor) -> Tensor:
    """Return what `net` (LPIPS), which compares images `[N, 3, H, W]` in [-1, 1], says of each frame, `[N]`."""
    found = []
    for pair in parts(original, rebuilt):
        x, y = (to_pixels(frames[None])[0].transpose(0, 1) for frames in pair)
        found.append(net(x, y).flatten())
    return torch.cat(found)
