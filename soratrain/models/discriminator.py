"""PatchGAN for video: judges each small block of a clip as real or rebuilt (Isola et al., "Image-to-Image Translation
with Conditional Adversarial Networks", 2017, with convolutions over time as well, as in Ge et al., "TATS", 2022).

Norms are per position (RMSNorm), so a logit depends on its own receptive field alone: not on the rest of the clip, as
under GroupNorm, nor on what else is in the batch, as under BatchNorm. An image is a clip of one frame.

Legend: B samples, T H W frames, height, width in pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.errors import ConfigError
from soratrain.models.layers import RMSNorm

SLOPE = 0.2  # of the leaky ReLU


class PatchDiscriminator(nn.Module):
    """Strided convolutions, then one logit a position.

    Args:
        channels: width after each convolution; each halves height and width.
        time_strides: 1 or 2 for each convolution; n frames become ⌈n / stride⌉.

    Raises:
        ConfigError: lists that are empty or of unequal length, or another stride.
    """

    def __init__(self, *, channels: Sequence[int], time_strides: Sequence[int]) -> None:
        super().__init__()
        if not channels or len(time_strides) != len(channels) or any(stride not in (1, 2) for stride in time_strides):
            raise ConfigError(
                f"discriminator: channels={list(channels)} and time_strides={list(time_strides)} must be of one length,"
                " the strides 1 or 2"
            )
        widths = [3, *channels]
        self.convs = nn.ModuleList(
            nn.Conv3d(widths[i], widths[i + 1], (3, 4, 4), (stride, 2, 2), padding=1)
            for i, stride in enumerate(time_strides)
        )
        self.norms = nn.ModuleList(RMSNorm(width) for width in channels[1:])
        self.head = nn.Conv3d(widths[-1], 1, 3, padding=1)
        for conv in (*self.convs, self.head):
            nn.init.normal_(conv.weight, std=0.02)
            nn.init.zeros_(conv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits `[B, 1, t, h, w]`, fp32, positive for real, of pixels `[B, 3, T, H, W]` in [-1, 1]."""
        for index, conv in enumerate(self.convs):
            x = conv(x)
            x = F.leaky_relu(self.norms[index - 1](x) if index else x, SLOPE)
        return self.head(x).float()
