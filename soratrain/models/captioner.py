"""Captioner: a video in, its description out; trained on contrast and language together (CoCa, Yu et al., 2022).

Frames are taken by time, cut into spacetime patches at the clip's own size and length, and mixed by a transformer whose
positions are floats (seconds and patches), so that any size, duration and frame rate, and single images, are one case.
An attentional pooler asks the tokens with learned queries: one answer is the clip's vector for the contrastive loss,
the others are what a causal byte-level decoder reads while it writes. A style token in front says which kind of
description is wanted. The text side of the contrast is a `ByteTextEncoder` that lives beside this net.

Legend: B clips, N video tokens of the pack, D width, H heads, K head dim, Q pooled queries, L caption bytes, E vector.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models.attention import Packing, attend
from soratrain.models.caption_decoder import Block, Decoder, decode_caption, encode_captions, norm
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
        self.place = nn.Linear(5, dim)
        self.norm_in, self.norm_out = norm(dim), norm(dim)
        self.blocks = nn.ModuleList(Block(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))

    def cut(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor, Tensor, Packing]:
        """Return patches `[N, P]`, their coordinates `[N, 3]` (t, y, x), where they stand in their clip `[N, 5]`, and
        the packing of the clips.
        """
        batch, _, frames, height, width = pixels.shape
        if not frames:
            raise DataError(f"a clip of shape {tuple(pixels.shape)} has no frames; leave it out")
        fps = fps.to(pixels.device).clamp(min=1e-3)
        index, count = sample_frames(frames, fps, self.frame_rate, self.max_frames)
        pt, ph, pw = self.patch
        index = torch.cat([index, index[:, -1:].expand(-1, -index.shape[1] % pt)], dim=1)
        taken = pixels[torch.arange(batch, device=pixels.device)[:, None], :, index]  # B, n, C, H, W
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
        last = ((count - 1).clamp(min=0) / (count - 1).clamp(min=1)).float()[:, None, None, None].expand(shape)
        duration = (index[:, -1] / fps).float()[:, None, None, None].expand(shape)
        middle = [(y + 0.5) * (2 / rows) - 1, (x + 0.5) * (2 / columns) - 1]
        places = torch.stack([seconds - duration / 2, duration, last, *middle], dim=-1)
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


class Contrast(nn.Module):
    """Vectors of clips and texts in one space, and the loss that brings the right ones together.

    InfoNCE with a learned temperature (Radford et al., 2021), both ways.
    """

    def __init__(self, *, dim: int, text_dim: int, vector_dim: int) -> None:
        super().__init__()
        self.video, self.text = nn.Linear(dim, vector_dim, bias=False), nn.Linear(text_dim, vector_dim, bias=False)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.video.weight.no_muon = self.text.weight.no_muon = True  # type: ignore[attr-defined]

    def forward(self, video_BD: Tensor, text_BD: Tensor, same_BB: Tensor) -> Tensor:
        """Return each clip's loss `[B]`; pairs marked in `same_BB` have one caption and are no negatives."""
        video_BE, text_BE = (
            F.normalize(self.video(video_BD).float(), dim=-1),
            F.normalize(self.text(text_BD).float(), dim=-1),
        )
        with torch.autocast(video_BE.device.type, enabled=False):
            scores = video_BE @ text_BE.T * self.log_scale.clamp(max=math.log(100.0)).exp()
        others = same_BB & ~torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(others, float("-inf"))
        own = scores.diagonal()
        return (scores.logsumexp(1) + scores.logsumexp(0)) / 2 - own


class Captioner(nn.Module):
    """Clips to captions and to vectors.

    Args:
        dim, depth, num_heads: of the video transformer; `dim / num_heads` is even and at least 6.
        patch, stem, frame_rate, max_frames: how video becomes tokens, see `VideoEncoder`.
        queries: pooled answers that the decoder reads.
        decoder_dim, decoder_depth, decoder_heads: of the decoder.
        table: rows for hashed n-grams of bytes.
        max_bytes: longest caption in UTF-8 bytes; longer ones are cut while training.
        styles: kinds of caption that can be asked for; the order is stored in the weights, so only append.
        text_dim: width of the text encoder on the other side of the contrast.
        vector_dim: width of the shared space.
        mlp_ratio: hidden width of the MLPs over the width.
    """

    taught: Tensor

    def __init__(
        self,
        *,
        dim: int = 192,
        depth: int = 3,
        num_heads: int = 3,
        patch: Sequence[int] = (4, 8, 8),
        stem: Sequence[int] = (),
        frame_rate: float = 8.0,
        max_frames: int = 64,
        queries: int = 8,
        decoder_dim: int = 192,
        decoder_depth: int = 2,
        decoder_heads: int = 3,
        table: int = 4096,
        max_bytes: int = 400,
        styles: Sequence[str] = ("short", "long", "camera", "tags"),
        text_dim: int = 128,
        vector_dim: int = 128,
        mlp_ratio: float = 3.0,
    ) -> None:
        super().__init__()
        for width, heads in ((dim, num_heads), (decoder_dim, decoder_heads)):
            if width % (2 * heads):
                raise ConfigError(f"captioner width {width} does not give {heads} heads of even size")
        if not styles or len(set(styles)) != len(styles):
            raise ConfigError(f"captioner.styles={list(styles)} must name each style once")
        self.styles, self.max_bytes = tuple(styles), max_bytes
        self.register_buffer("taught", torch.zeros(len(self.styles)))
        self.encoder = VideoEncoder(
            dim=dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            patch=patch,
            stem=stem,
            frame_rate=frame_rate,
            max_frames=max_frames,
        )
        self.pooler = Pooler(dim=dim, num_heads=num_heads, queries=queries + 1, mlp_ratio=mlp_ratio)
        self.bridge = nn.Linear(dim, decoder_dim, bias=False)
        self.decoder = Decoder(
            dim=decoder_dim,
            depth=decoder_depth,
            num_heads=decoder_heads,
            mlp_ratio=mlp_ratio,
            styles=len(styles),
            table=table,
        )
        self.contrast = Contrast(dim=dim, text_dim=text_dim, vector_dim=vector_dim)

    def style_ids(self, styles: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
        """Return the styles' numbers `[B]`.

        Raises:
            ConfigError: a style that this captioner does not have.
        """
        for style in styles:
            if style not in self.styles:
                raise ConfigError(
                    f"caption style {style!r} is unknown to this captioner; use one of {list(self.styles)}"
                )
        return torch.tensor([self.styles.index(style) for style in styles], device=device)

    def teach(self, styles: Sequence[str]) -> None:
        """Remember that captions of `styles` have been trained on; only these are worth asking for."""
        for style in self.style_ids(sorted(set(styles))).tolist():
            self.taught[style] = 1.0

    @property
    def known_styles(self) -> tuple[str, ...]:
        """The styles that this captioner was trained on."""
        return tuple(style for style, taught in zip(self.styles, self.taught.tolist(), strict=True) if taught)

    def look(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder reads of clips `[B, Q, width]`, and what their vectors are made of `[B, D]`."""
        answers = self.pooler(*self.encoder(pixels, fps))
        return self.bridge(answers[:, 1:]), answers[:, 0]

    def forward(
        self, pixels: Tensor, fps: Tensor, captions: Sequence[str], styles: Sequence[str], text_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each clip's language loss (mean over its caption's bytes) and contrastive loss, `[B]` both, in nats.

        Args:
            pixels: `[B, 3, T, H, W]` in [-1, 1].
            fps: frames per second `[B]`.
            captions, styles: one a clip.
            text_BD: pooled features of the captions.
        """
        device = pixels.device
        pooled_BQD, video_BD = self.look(pixels, fps)
        symbols_BL, targets_N, packing = encode_captions(captions, self.max_bytes)
        memory = self.decoder.memory(pooled_BQD)
        logits_NV = self.decoder(symbols_BL.to(device), self.style_ids(styles, device), memory, packing)
        losses_N = F.cross_entropy(logits_NV, targets_N.to(device), reduction="none")
        same_BB = torch.tensor([[one == other for other in captions] for one in captions], device=device)
        return packing.mean(losses_N), self.contrast(video_BD, text_BD, same_BB)

    def embed_video(self, pixels: Tensor, fps: Tensor) -> Tensor:
        """Return unit vectors of clips, `[B, E]`."""
        return F.normalize(self.contrast.video(self.look(pixels, fps)[1]).float(), dim=-1)

    def embed_text(self, text_BD: Tensor) -> Tensor:
        """Return unit vectors of texts from their pooled features, `[B, E]`."""
        return F.normalize(self.contrast.text(text_BD).float(), dim=-1)

    @torch.no_grad()
    def say(
        self,
        pooled_BQD: Tensor,
        style: str,
        *,
        max_bytes: int | None = None,
        top_p: float = 0.0,
        draws: Sequence[int] = (),
        cached: bool = True,
    ) -> list[str]:
        """Return the captions of clips that have been looked at; arguments as for `Decoder.write`.

        A caption that does not end within `max_bytes` comes back empty: half a sentence is no description.
        """
        ids = self.style_ids([style] * len(pooled_BQD), pooled_BQD.device)
        written, ended = self.decoder.write(
            pooled_BQD, ids, max_bytes=max_bytes or self.max_bytes, top_p=top_p, draws=draws, cached=cached
        )
        return [decode_caption(data) if whole else "" for data, whole in zip(written, ended, strict=True)]

    @torch.no_grad()
    def generate(self, pixels: Tensor, fps: Tensor, style: str, **options: Any) -> list[str]:
        """Return a caption of each clip `[B, 3, T, H, W]` in [-1, 1]; `options` are those of `say`."""
        return self.say(self.look(pixels, fps)[0], style, **options)
