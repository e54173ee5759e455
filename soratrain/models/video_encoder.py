"""The video side of the captioner: clips of any size, length and frame rate to tokens, and tokens to a few answers.

Legend: B clips, M frames of all clips, N video tokens of the pack, P values of a patch, D width, H heads, K head dim,
Q queries.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models.attention import Packing, attend
from soratrain.models.caption_decoder import Block, norm
from soratrain.models.rope import rotations, split_axes

TIME_SCALE = 6.0  # coordinates turn 6 per second, as in the DiT


def sample_frames(frames: int, fps: Tensor, rate: float, limit: int) -> tuple[Tensor, Tensor]:
    """Choose frames by time: `rate` a second, or evenly spread where that would be more than `limit`.

    Args:
        frames: length of the clips.
        fps: frames per second of each, `[B]`.

    Returns:
        Frame indices `[B, n]`, the last repeated where a clip has fewer than the longest, and how many are real `[B]`.
    """
    stride = (fps.double() / rate).clamp(min=1.0)
    count = ((frames - 1) / stride).floor().long() + 1
    spread = (frames - 1) / (count.clamp(max=limit) - 1).clamp(min=1)
    stride = torch.where(count > limit, spread, stride)
    count = count.clamp(max=limit)
    places = torch.minimum(torch.arange(int(count.max()), device=fps.device)[None], count[:, None] - 1)
    return (places * stride[:, None]).round().long().clamp(max=frames - 1), count


def normalized(frames: Tensor, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return clips `[B, n, 3, H, W]` without their mean colour and at unit contrast, the mean `[B, 3]` and the contrast
    `[B, 1]`.

    A shape is then the same whatever it and its background are coloured in, and is learned from all colours at once.

    Args:
        share: weight of each frame `[B, n]`, summing to 1; a repeated frame has none.
    """
    mean = torch.einsum("bn,bnc->bc", share, frames.mean((3, 4)))
    square = torch.einsum("bn,bnc->bc", share, frames.square().mean((3, 4)))
    contrast = (square - mean.square()).clamp(min=0).mean(1, keepdim=True).sqrt() + 0.05
    return (frames - mean[:, None, :, None, None]) / contrast[:, None, :, None, None], mean, contrast


class Stem(nn.Module):
    """Convolutions of stride 2 before frames are cut: what a shape is, need not be learned for every place anew.

    Early convolutions help transformers to see, above all when data and steps are few (Xiao et al., 2021).

    Args:
        channels: of each convolution; none leaves the pixels as they are.
    """

    def __init__(self, channels: Sequence[int]) -> None:
        super().__init__()
        self.out_channels, self.stride = ([3, *channels])[-1], 2 ** len(channels)
        pairs = zip([3, *channels[:-1]], channels, strict=True) if channels else ()
        self.convolutions = nn.ModuleList(nn.Conv2d(wide, out, 3, 2, padding=1) for wide, out in pairs)

    def forward(self, x_MCHW: Tensor) -> Tensor:
        """Return features `[M, C', H / stride, W / stride]` of M frames."""
        for convolution in self.convolutions:
            x_MCHW = F.gelu(convolution(x_MCHW), approximate="tanh")
        return x_MCHW


class VideoEncoder(nn.Module):
    """Pixels to tokens: spacetime patches of frames taken by time, mixed at their float positions.

    Args:
        patch: frames, rows and columns of a patch; a clip's edge is repeated to fill the last ones.
        stem: channels of the convolutions before the cut, each halving rows and columns; they must divide `patch`.
        frame_rate: frames looked at per second.
        max_frames: most frames looked at; a longer clip is looked at more sparsely.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        patch: Sequence[int],
        stem: Sequence[int],
        frame_rate: float,
        max_frames: int,
    ) -> None:
        super().__init__()
        self.stem = Stem(stem)
        if patch[1] % self.stem.stride or patch[2] % self.stem.stride:
            raise ConfigError(f"captioner.patch={list(patch)} is no multiple of the stem's stride {self.stem.stride}")
        self.patch, self.frame_rate, self.max_frames = tuple(patch), frame_rate, max_frames
        self.channels = split_axes(dim // num_heads)
        self.embed = nn.Linear(self.stem.out_channels * math.prod(self.patch) // self.stem.stride**2, dim)
        self.place = nn.Linear(9, dim)
        self.norm_in, self.norm_out = norm(dim), norm(dim)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))

    def cut(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor, Tensor, Packing]:
        """Return patches `[N, P]`, their coordinates `[N, 3]` (t, y, x), nine numbers about each, and the packing.

        The nine `[N, 9]`: the patch's seconds from the clip's middle, the clip's seconds, whether it is more than one
        frame, the patch's row and column in [-1, 1], the clip's mean colour and contrast.

        Raises:
            DataError: a clip has no frames.
        """
        batch, _, frames, height, width = pixels.shape
        if not frames:
            raise DataError(f"a clip of shape {tuple(pixels.shape)} has no frames; leave it out")
        fps = fps.to(pixels.device).clamp(min=1e-3)
        index, count = sample_frames(frames, fps, self.frame_rate, self.max_frames)
        pt, ph, pw = self.patch
        index = torch.cat([index, index[:, -1:].expand(-1, -index.shape[1] % pt)], dim=1)
        taken = pixels[torch.arange(batch, device=pixels.device)[:, None], :, index]  # B, n, C, H, W
        real = (torch.arange(index.shape[1], device=fps.device)[None] < count[:, None]) / count[:, None]
        taken, mean, contrast = normalized(taken, real)
        taken = F.pad(taken.flatten(0, 1), (0, -width % pw, 0, -height % ph), mode="replicate")
        taken = self.stem(taken).unflatten(0, (batch, -1))
        ph, pw = ph // self.stem.stride, pw // self.stem.stride
        cut = taken.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(1, (-1, pt))  # B t pt C y ph x pw
        cut = cut.permute(0, 1, 4, 6, 3, 2, 5, 7)
        steps, rows, columns = cut.shape[1:4]
        seconds = (index / fps[:, None]).unflatten(1, (-1, pt)).mean(-1).float()
        y, x = torch.arange(rows, device=fps.device).float(), torch.arange(columns, device=fps.device).float()
        shape = (batch, steps, rows, columns)
        seconds = seconds[:, :, None, None].expand(shape)
        y, x = y[:, None].expand(shape), x.expand(shape)
        coords = torch.stack([seconds * TIME_SCALE, y, x], dim=-1)
        moving = (count > 1).float()[:, None, None, None].expand(shape)
        duration = (index[:, -1] / fps).float()[:, None, None, None].expand(shape)
        middle = [(y + 0.5) * (2 / rows) - 1, (x + 0.5) * (2 / columns) - 1]
        overall = torch.cat([mean, contrast], dim=1)[:, None, None, None].expand(*shape, -1)
        places = torch.cat([torch.stack([seconds - duration / 2, duration, moving, *middle], dim=-1), overall], dim=-1)
        lengths = (-(count // -pt)).tolist()
        packing = Packing.of([length * rows * columns for length in lengths])
        flat = [cut.flatten(4).flatten(1, 3), coords.flatten(1, 3), places.flatten(1, 3)]
        if packing.equal:
            return *(part.flatten(0, 1) for part in flat), packing
        keep = torch.arange(steps, device=fps.device)[None] < torch.tensor(lengths, device=fps.device)[:, None]
        keep = keep[:, :, None].expand(-1, -1, rows * columns).flatten(1)
        return *(part[keep] for part in flat), packing

    def forward(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Packing]:
        """Return the tokens of clips `[B, 3, T, H, W]` in [-1, 1], `[N, D]`, and how they are packed."""
        patches, coords, places, packing = self.cut(pixels, fps)
        x_ND = self.norm_in(self.embed(patches) + self.place(places))
        rotation = rotations(coords, self.channels)
        for block in self.blocks:
            x_ND = block(x_ND, packing, rotation)
        return self.norm_out(x_ND), packing


class Pooler(nn.Module):
    """Learned queries that each ask all tokens of a clip once (attentional pooling, CoCa section 3.2)."""

    def __init__(self, *, dim: int, num_heads: int, queries: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.queries = nn.Parameter(torch.randn(queries, dim))
        self.queries.no_muon = True  # type: ignore[attr-defined]
        self.q, self.kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.norm_q, self.norm_k = norm(dim // num_heads), norm(dim // num_heads)
        self.out = nn.Linear(dim, dim, bias=False)
        hidden = int(mlp_ratio * dim)
        self.norm_mlp, self.norm_out = norm(dim), norm(dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x_ND: Tensor, packing: Packing) -> Tensor:
        """Return the answers `[B, Q, D]`."""
        asking = Packing((len(self.queries),) * len(packing))
        k_NHK, v_NHK = self.kv(x_ND).unflatten(-1, (2, self.num_heads, -1)).unbind(1)
        q_QHK = self.norm_q(self.q(self.queries).unflatten(-1, (self.num_heads, -1))).to(v_NHK.dtype)
        k_NHK = self.norm_k(k_NHK).to(v_NHK.dtype)
        answers = attend(q_QHK.repeat(len(packing), 1, 1), k_NHK, v_NHK, asking, packing)
        x_BQD = asking.pad(self.out(answers.flatten(1)))
        return self.norm_out(x_BQD + self.down(F.gelu(self.up(self.norm_mlp(x_BQD)), approximate="tanh")))
