"""What happens between the VAE's convolutions: norm, SiLU, sums, and putting a chunk behind the frames before it.

Each is a pass over memory. Where no gradient is wanted on a CPU, results are written at once where the convolution
reads them, in the order of memory in which its kernel is fastest.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Divide each position's channels by their root mean square, in fp32 (Zhang & Sennrich, 2019), and scale them."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        inverse = torch.rsqrt(wide.square().mean(dim=1, keepdim=True) + self.eps)
        return (wide * inverse * self.scale.float()[:, None, None, None]).to(x.dtype)

    def activate_into(self, out: Tensor, x: Tensor) -> None:
        """Write SiLU of the normalised `x`, fp32, into `out`, without memory of its own."""
        square = torch.linalg.vector_norm(x, dim=1, keepdim=True).square_().div_(x.shape[1])
        torch.mul(x, square.add_(self.eps).rsqrt_(), out=out)
        F.silu(out.mul_(self.scale[:, None, None, None]), inplace=True)


def lean(x: Tensor) -> bool:
    """Return whether `x` is worked on in fp32 on a CPU without a gradient, which may overwrite what it has used."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and not torch.is_grad_enabled()


def joined(before: Tensor | int | None, x: Tensor, norm: RMSNorm | None) -> Tensor:
    """Return `x`, or SiLU of the normalised `x`, `[B, C, T, H, W]`, behind the frames `before` it.

    On a CPU channels lie last in memory where frames stand alone, and first where kernels reach through time, as
    oneDNN's kernels for the one and the other want it (each a quarter faster than the other way round).

    Args:
        before: frames, activated already; or how many times to repeat the first; None: each frame stands alone.
    """
    if not lean(x):
        x = F.silu(norm(x)) if norm is not None else x
        if before is None:
            return x
        return torch.cat([x[:, :, :1].expand(-1, -1, before, -1, -1) if isinstance(before, int) else before, x], dim=2)
    lead = 0 if before is None else before if isinstance(before, int) else before.shape[2]
    batch, channels, frames, height, width = x.shape
    shape = (batch, channels, lead + frames, height, width)
    order = torch.channels_last_3d if before is None else torch.contiguous_format
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=order)
    body = out[:, :, lead:]
    if norm is not None:
        norm.activate_into(body, x)
    else:
        body.copy_(x)
    if before is not None:
        out[:, :, :lead].copy_(body[:, :, :1] if isinstance(before, int) else before)
    return out


def add(y: Tensor, x: Tensor) -> Tensor:
    """Return `y + x`, in the memory of `y` where no gradient needs what it held."""
    return y + x if torch.is_grad_enabled() or x.dtype != y.dtype else y.add_(x)
