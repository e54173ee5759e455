"""Captioner: a video in, its description out; trained on contrast and language together (CoCa, Yu et al., 2022).

Frames are taken by time, cut into spacetime patches at the clip's own size and length, and mixed by a transformer whose
positions are floats (seconds and patches), so that any size, duration and frame rate, and single images, are one case.
An attentional pooler asks the tokens with learned queries: one answer is the clip's vector for the contrastive loss,
the others are what a causal byte-level decoder reads while it writes. A style token in front says which kind of
description is wanted. The text side of the contrast is a `ByteTextEncoder` that lives beside this net.

Legend: B clips, N video tokens of the pack, D width, H heads, K head dim, Q pooled queries, L caption bytes, E vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.errors import ConfigError
from soratrain.models.caption_decoder import Decoder, decode_caption, encode_captions
from soratrain.models.caption_model import CaptionModel, Contrast, same_captions
from soratrain.models.video_encoder import Pooler, VideoEncoder


class Captioner(CaptionModel):
    """The body that is trained from nothing: clips to captions and to vectors.

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
        super().__init__(styles=styles, longest=max_bytes)
        for width, heads in ((dim, num_heads), (decoder_dim, decoder_heads)):
            if width % (2 * heads):
                raise ConfigError(f"captioner width {width} does not give {heads} heads of even size")
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

    def size(self, caption: str) -> int:
        """Return how many bytes of UTF-8 a caption has."""
        return len(caption.encode("utf-8", "replace"))

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
        symbols_BL, targets_N, packing = encode_captions(captions, self.most)
        memory = self.decoder.memory(pooled_BQD)
        logits_NV = self.decoder(symbols_BL.to(device), self.style_ids(styles, device), memory, packing)
        losses_N = F.cross_entropy(logits_NV, targets_N.to(device), reduction="none")
        return packing.mean(losses_N), self.contrast(video_BD, text_BD, same_captions(captions, device))

    def write(
        self, pooled_BQD: Tensor, styles: Sequence[str], bounds: Sequence[int], **how: Any
    ) -> tuple[list[str], list[bool]]:
        """Return texts of at most so many bytes, and which came to their end; see `CaptionModel.write`."""
        ids = self.style_ids(styles, pooled_BQD.device)
        written, ended = self.decoder.write(pooled_BQD, ids, max_bytes=bounds, **how)
        return [decode_caption(data) for data in written], ended
