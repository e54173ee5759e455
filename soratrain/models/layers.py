"""Causal video layers with explicit state: `y, state = layer(x, state)`.

A layer given `state=None` stands at the start of a clip; given the state it returned for one chunk, it continues with
the next, and the outputs joined in time equal those for the whole clip. All of them are local in space and look only
backwards in time.

Legend: B samples, C channels, T frames, H height, W width; tensors are `[B, C, T, H, W]`. A first chunk has 1 + s·n
frames and every later one s·n, where s is the time stride of what follows.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from soratrain.errors import ConfigError
from soratrain.models.pointwise import RMSNorm, add, joined, lean

State = Any  # None at the start of a clip; then tensors, True where nothing need be kept, or lists of these


class Local(nn.Module):
    """A layer of which each output position depends on a window of input positions, in height as in width.

    Attributes:
        scale: output positions per input position, in height as in width.
        volume: the same in time, height and width together.
    """

    scale = volume = Fraction(1)

    def window(self, start: int, stop: int) -> tuple[int, int]:
        """Return the input positions on which outputs `start` to `stop` depend, as if the picture had no border."""
        raise NotImplementedError


class CausalConv3d(Local):
    """Convolution that sees `kernel - 1` earlier frames; before the clip they repeat its first frame.

    Args:
        in_channels, out_channels: C before and after.
        kernel: (time, side, side), side odd.
        stride: (time, side, side); 1 + s·n frames become 1 + n.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        out_channels: int,
        kernel: Sequence[int] = (3, 3, 3),
        stride: Sequence[int] = (1, 1, 1),
    ) -> None:
        super().__init__()
        time, height, width = kernel
        self.past = time - stride[0]
        assert self.past >= 0, "a stride longer than its kernel would skip frames"
        assert height == width and stride[1] == stride[2], "height and width are alike, or windows would not be"
        self.lead, self.margin = time - 1, height // 2
        self.scale, self.volume = Fraction(1, stride[1]), Fraction(1, stride[0] * stride[1] ** 2)
        self.conv = nn.Conv3d(
            in_channels,
            out_channels,
            kernel_size=(time, height, width),
            stride=(stride[0], stride[1], stride[2]),
            padding=(0, height // 2, width // 2),
        )

    def forward(self, x: Tensor, state: State = None, norm: RMSNorm | None = None) -> tuple[Tensor, State]:
        """Return the convolution of `x`, or of `SiLU(norm(x))`, and the last frames, which the next chunk needs."""
        if self.lead == 0:
            x = joined(None, x, norm)
            return self._flat(x) if lean(x) else self.conv(x), True
        x = joined(state if state is not None else self.lead, x, norm)
        rest = x[:, :, x.shape[2] - self.past :]
        return self.conv(x), rest if torch.is_grad_enabled() else rest.clone()

    def _flat(self, x: Tensor) -> Tensor:
        """Convolve each frame alone, for which two-dimensional kernels are faster."""
        conv = self.conv
        frames = x.transpose(1, 2).flatten(0, 1)
        y = F.conv2d(frames, conv.weight[:, :, 0], conv.bias, stride=conv.stride[1:], padding=conv.padding[1:])
        return y.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)

    def window(self, start: int, stop: int) -> tuple[int, int]:
        stride = self.scale.denominator
        return start * stride - self.margin, (stop - 1) * stride + self.margin + 1


class ResidualBlock(Local):
    """Two rounds of norm, SiLU and causal convolution, added to the input; starts as the identity.

    Args:
        channels: C.
        kernel: of both convolutions, (time, height, width).
    """

    def __init__(self, *, channels: int, kernel: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        self.norms = nn.ModuleList(RMSNorm(channels) for _ in range(2))
        convs = [CausalConv3d(in_channels=channels, out_channels=channels, kernel=kernel) for _ in range(2)]
        nn.init.zeros_(convs[-1].conv.weight)
        assert convs[-1].conv.bias is not None
        nn.init.zeros_(convs[-1].conv.bias)
        self.convs = nn.ModuleList(convs)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        y, states = x, []
        for norm, conv, before in zip(self.norms, self.convs, state or (None, None), strict=True):
            y, after = conv(y, before, norm)
            states.append(after)
        return add(y, x), states

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return through(self.convs, start, stop)


class Down(Local):
    """Strided causal convolution beside a shortcut that averages (Chen et al., "Deep Compression Autoencoder", 2025).

    The shortcut stacks the pixels (and frames) that fall together as channels and averages groups of them.

    Args:
        in_channels, out_channels: `in_channels · time · space²` must be a multiple of `out_channels`.
        time, space: strides, 1 or 2; 1 + 2n frames become 1 + n.

    Raises:
        ConfigError: the channels do not divide.
    """

    def __init__(self, *, in_channels: int, out_channels: int, time: int, space: int) -> None:
        super().__init__()
        if in_channels * time * space**2 % out_channels:
            raise ConfigError(
                f"{in_channels} channels downsampled by {time}·{space}·{space} do not split into {out_channels} equal"
                f" groups; make the latter a divisor of {in_channels * time * space**2}"
            )
        self.time, self.space, self.out_channels = time, space, out_channels
        self.scale, self.volume = Fraction(1, space), Fraction(1, time * space**2)
        self.conv = CausalConv3d(in_channels=in_channels, out_channels=out_channels, stride=(time, space, space))

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        y, after = self.conv(x, state)
        group = x.shape[1] * self.time * self.space**2 // self.out_channels
        s = self.space
        if group % s**2 == 0:  # averages of whole squares, which need not be stacked first
            x, group, s = F.avg_pool3d(x, (1, s, s)), group // s**2, 1
        if self.time > 1 and state is None:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.time - 1, -1, -1), x], dim=2)
        x = rearrange(x, "b c (t k) (h p) (w q) -> b (c k p q) t h w", k=self.time, p=s, q=s)
        return add(y, x.unflatten(1, (self.out_channels, group)).mean(dim=2) if group > 1 else x), after

    def window(self, start: int, stop: int) -> tuple[int, int]:
        low, high = self.conv.window(start, stop)
        return min(low, start * self.space), max(high, stop * self.space)


class Up(Local):
    """Causal convolution to more channels, dealt out to space and time, beside a shortcut that repeats the input.

    Latent frame 0 stands for one frame, every later one for `time`: 1 + n frames become 1 + n·time.

    Args:
        in_channels, out_channels: `out_channels · time · space²` must be a multiple of `in_channels`.
        time, space: factors, 1 or 2.
        kernel: of the convolution, (time, height, width).

    Raises:
        ConfigError: the channels do not divide.
    """

    def __init__(
        self, *, in_channels: int, out_channels: int, time: int, space: int, kernel: Sequence[int] = (3, 3, 3)
    ) -> None:
        super().__init__()
        dealt = out_channels * time * space**2
        if dealt % in_channels:
            raise ConfigError(
                f"{in_channels} channels cannot be repeated to fill {out_channels} upsampled by {time}·{space}·{space};"
                f" make them a divisor of {dealt}"
            )
        self.time, self.space, self.repeats = time, space, dealt // in_channels
        self.scale, self.volume = Fraction(space), Fraction(time * space**2)
        self.conv = CausalConv3d(in_channels=in_channels, out_channels=dealt, kernel=kernel)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        y, after = self.conv(x, state)
        y = add(y.unflatten(1, (x.shape[1], self.repeats)), x.unsqueeze(2)).flatten(1, 2)
        s = self.space
        y = rearrange(y, "b (c k p q) t h w -> b c (t k) (h p) (w q)", k=self.time, p=s, q=s)
        return y if state is not None else y[:, :, self.time - 1 :], after

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return self.conv.window(start // self.space, -(-stop // self.space))


class Chain(nn.ModuleList):
    """Stateful layers one after another; its state is the list of theirs.

    Args:
        layers: in order.
        recompute: what the backward pass computes again, instead of keeping its activations: `none`, `blocks` (each
            layer, so only what passes between layers is kept) or `levels` (each segment). Gradients are the same.
    """

    def __init__(self, layers: Iterable[nn.Module] = (), recompute: str = "none") -> None:
        super().__init__(layers)
        self.recompute = recompute

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        before, after = state or [None] * len(self), []
        if self.recompute == "none" or not torch.is_grad_enabled():
            for layer, kept in zip(self, before, strict=True):
                x, kept = layer(x, kept)
                after.append(kept)
            return x, after
        for group in self.segments() if self.recompute == "levels" else [Chain([layer]) for layer in self]:
            start = len(after)
            x, kept = again(group, x, before[start : start + len(group)])
            after += kept
        return x, after

    def segments(self) -> list[Chain]:
        """Return the layers of each level together, cut on the coarse side of every `Down` and `Up`.

        There the fewest values pass from one to the next.
        """
        groups: list[list[nn.Module]] = [[]]
        for layer in self:
            if isinstance(layer, Up):
                groups.append([])
            groups[-1].append(layer)
            if isinstance(layer, Down):
                groups.append([])
        return [Chain(group) for group in groups]


def again(layer: nn.Module, x: Tensor, state: State) -> tuple[Tensor, State]:
    """Return `layer(x, state)`, of which the backward pass keeps the arguments alone and computes the rest again."""

    def forward(x: Tensor, state: State) -> tuple[Tensor, State]:
        y, after = layer(x, state)
        return y, tree_map_only(Tensor, Tensor.clone, after)  # a view would keep what it is a part of

    return checkpoint(forward, x, state, use_reentrant=False, preserve_rng_state=False)


class Head(Local):
    """Norm, SiLU and a causal convolution."""

    def __init__(self, *, in_channels: int, out_channels: int, kernel: Sequence[int] = (3, 3, 3)) -> None:
        super().__init__()
        self.norm = RMSNorm(in_channels)
        self.conv = CausalConv3d(in_channels=in_channels, out_channels=out_channels, kernel=kernel)

    def forward(self, x: Tensor, state: State = None) -> tuple[Tensor, State]:
        return self.conv(x, state, self.norm)

    def window(self, start: int, stop: int) -> tuple[int, int]:
        return self.conv.window(start, stop)


def through(layers: Iterable[nn.Module], start: int, stop: int) -> tuple[int, int]:
    """Return the positions before `layers` on which positions `start` to `stop` after them depend."""
    for layer in reversed(list(layers)):
        assert isinstance(layer, Local)
        start, stop = layer.window(start, stop)
    return start, stop


class Front(nn.Module):
    """Exact, orthogonal exchange of space and time for channels, and back.

    Args:
        kind: `none`, `space_to_depth`, or `haar` (the Haar wavelet; a factor of 4 takes two levels of its packet).
        time, space: factors k and f, powers of two up to 8; pixels `[B, C, 1 + k·n, H, W]` become
            `[B, C·k·f², 1 + n, H/f, W/f]`, the first frame counting as k equal ones.

    Raises:
        ConfigError: an unknown kind, or factors that do not go with it.
    """

    def __init__(self, *, kind: str, time: int, space: int) -> None:
        super().__init__()
        if kind not in ("none", "space_to_depth", "haar"):
            raise ConfigError(f"vae.front={kind!r} is unknown; use none, space_to_depth or haar")
        if (kind == "none") != (time == space == 1) or not {time, space} <= {1, 2, 4, 8}:
            raise ConfigError(
                f"vae.front={kind} does not go with vae.front_strides={[time, space]}; none has [1, 1], the others"
                " [time, space] of 1, 2, 4 or 8"
            )
        self.time, self.space = time, space
        self.steps = [(time, space)]
        if kind == "haar":
            levels = max(time, space).bit_length() - 1
            self.steps = [(1 + (time >> i > 1), 1 + (space >> i > 1)) for i in range(levels)]
        for i, (k, f) in enumerate(self.steps):
            mix = wavelet(k, f) if kind == "haar" else torch.empty(0)
            self.register_buffer(f"mix{i}", mix, persistent=False)

    def forward(self, x: Tensor, first: bool = True) -> Tensor:
        """Return `x` with its blocks as channels; `first` says that it begins at the clip's start."""
        if first and self.time > 1:
            x = torch.cat([x[:, :, :1].expand(-1, -1, self.time - 1, -1, -1), x], dim=2)
        for i, (k, f) in enumerate(self.steps):
            mix = getattr(self, f"mix{i}")
            x = rearrange(x, "b c (t k) (h p) (w q) -> b c (k p q) t h w", k=k, p=f, q=f)
            x = mixed(mix, x).flatten(1, 2)
        return x

    def inverse(self, x: Tensor, first: bool = True) -> Tensor:
        """Undo `forward`."""
        for i, (k, f) in reversed(list(enumerate(self.steps))):
            mix = getattr(self, f"mix{i}")
            x = mixed(mix.t(), x.unflatten(1, (-1, k * f * f)))
            x = rearrange(x, "b c (k p q) t h w -> b c (t k) (h p) (w q)", k=k, p=f, q=f)
        return x[:, :, self.time - 1 :] if first else x


def mixed(mix: Tensor, x: Tensor) -> Tensor:
    """Return `x` `[B, C, K, T, H, W]` with its blocks' K values mixed, in fp32: bf16 has fewer steps than pixels."""
    if not mix.numel():
        return x
    with torch.autocast(x.device.type, enabled=False):
        return torch.einsum("n k, b c k t h w -> b c n t h w", mix, x.float())


def wavelet(time: int, space: int) -> Tensor:
    """Return the orthogonal Haar matrix over blocks of `time` × `space` × `space`, each 1 or 2."""
    pair = torch.tensor([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5
    matrix = torch.ones(1, 1)
    for factor in (time, space, space):
        matrix = torch.kron(matrix, pair if factor == 2 else torch.ones(1, 1))
    return matrix
