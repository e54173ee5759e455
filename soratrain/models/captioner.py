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

from soratrain.errors import ConfigError
from soratrain.models.caption_decoder import Decoder, decode_caption, encode_captions
from soratrain.models.video_encoder import Pooler, VideoEncoder


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

    longest: Tensor

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
        self.register_buffer("longest", torch.zeros(len(self.styles)))
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

    def teach(self, captions: Sequence[str], styles: Sequence[str]) -> None:
        """Remember how long captions of each style have been; a style without any is not worth asking for."""
        for style, caption in zip(self.style_ids(styles).tolist(), captions, strict=True):
            self.longest[style] = max(float(self.longest[style]), len(caption.encode("utf-8", "replace")))

    @property
    def known_styles(self) -> tuple[str, ...]:
        """The styles that this captioner was trained on."""
        return tuple(style for style, length in zip(self.styles, self.longest.tolist(), strict=True) if length)

    def bound(self, style: str) -> int:
        """Return after how many bytes a caption of `style` has lost its way: a quarter above the longest it learned."""
        length = float(self.longest[self.styles.index(style)])
        return min(self.max_bytes, int(1.25 * length) + 16) if length else self.max_bytes

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

        A caption that does not end within `max_bytes` (`bound`, unless given) comes back empty: half a sentence is no
        description.
        """
        ids = self.style_ids([style] * len(pooled_BQD), pooled_BQD.device)
        written, ended = self.decoder.write(
            pooled_BQD, ids, max_bytes=max_bytes or self.bound(style), top_p=top_p, draws=draws, cached=cached
        )
        return [decode_caption(data) if whole else "" for data, whole in zip(written, ended, strict=True)]

    @torch.no_grad()
    def generate(self, pixels: Tensor, fps: Tensor, style: str, **options: Any) -> list[str]:
        """Return a caption of each clip `[B, 3, T, H, W]` in [-1, 1]; `options` are those of `say`."""
        return self.say(self.look(pixels, fps)[0], style, **options)
