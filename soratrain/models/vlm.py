"""The captioner's other body: a vision encoder and a language model of Hugging Face, and what brings them together.

Frames are taken by time and go through the encoder one by one, at their own aspect ratio. Their tokens, with the time
at which they stand (in seconds: no frame rate is special), are asked by the learned queries of a perceiver; a projector
turns the answers into vectors that stand in front of the language model's words. One answer more is the clip's vector
for the contrastive loss. Encoder and language model are each frozen, adapted by low-rank matrices, or trained whole.

Legend: B clips, M frames of all clips, P tokens of a frame, Q queries, D width, W the language model's width, E vector.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models.attention import Packing
from soratrain.models.caption_model import CaptionModel, Contrast, same_captions
from soratrain.models.hf_language import LanguageTower
from soratrain.models.hf_vision import VisionTower
from soratrain.models.resampler import Resampler
from soratrain.models.video_encoder import sample_frames

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "query", "key", "value", "query_key_value", "c_attn")


class VLM(CaptionModel):
    """Clips to captions and to vectors, with others' nets.

    Args:
        vision, language: where they are: folders that `save_pretrained` wrote, or ids on the hub (OWNER/NAME).
        vision_tuning, language_tuning: `frozen`, `lora` or `full`.
        skip_layers: of the encoder, left out at its end (1 for CLIP).
        patches: most that a frame is cut into.
        frame_rate, max_frames: frames looked at per second, and at most; a longer clip is looked at more sparsely.
        dim, depth, num_heads: of the perceiver.
        queries: vectors that stand for a clip.
        max_tokens: longest caption in the language model's tokens; longer ones are cut while training.
        styles: kinds of caption that can be asked for; the order is stored in the weights, so only append.
        instructions: of a style, what the model is asked in words; beside it each style has a token of its own.
        chat: ask within the model's chat template, where it has one.
        lora_rank, lora_alpha: of adapters.
        lora_targets: last parts of the names of the layers that get one.
        dtype: of what is frozen, `fp32` or `bf16`.
        text_dim: width of the text encoder on the other side of the contrast.
        vector_dim: width of the shared space.

    Raises:
        ConfigError: transformers is not installed, or a value does not fit.
        DataError: the encoder or the language model is not where it should be.
    """

    def __init__(
        self,
        *,
        vision: str,
        language: str,
        vision_tuning: str = "frozen",
        language_tuning: str = "lora",
        skip_layers: int = 0,
        patches: int = 196,
        frame_rate: float = 2.0,
        max_frames: int = 32,
        dim: int = 768,
        depth: int = 2,
        num_heads: int = 12,
        queries: int = 64,
        max_tokens: int = 256,
        styles: Sequence[str] = ("short", "long", "camera", "tags"),
        instructions: Mapping[str, str] | None = None,
        chat: bool = True,
        lora_rank: int = 16,
        lora_alpha: float = 32.0,
        lora_targets: Sequence[str] = TARGETS,
        dtype: str = "fp32",
        text_dim: int = 128,
        vector_dim: int = 256,
    ) -> None:
        super().__init__(styles=styles, longest=max_tokens)
        self.instructions = dict(instructions or {})
        if dim % (2 * num_heads):
            raise ConfigError(f"captioner width {dim} does not give {num_heads} heads of even size")
        if min(queries, max_tokens, depth, max_frames) < 1 or frame_rate <= 0:
            raise ConfigError(
                f"captioner.queries={queries}, max_tokens={max_tokens}, depth={depth}, max_frames={max_frames} must be"
                f" at least 1, and frame_rate={frame_rate} above 0"
            )
        if unknown := sorted(self.instructions.keys() - set(self.styles)):
            raise ConfigError(f"captioner.instructions.{unknown[0]}: no such style; use one of {list(styles)}")
        common: dict[str, Any] = {"dtype": dtype, "rank": lora_rank, "alpha": lora_alpha, "targets": lora_targets}
        self.vision = VisionTower(folder=vision, tuning=vision_tuning, patches=patches, skip=skip_layers, **common)
        self.language = LanguageTower(folder=language, tuning=language_tuning, chat=chat, **common)
        self.frame_rate, self.max_frames = frame_rate, max_frames
        self.resampler = Resampler(
            inputs=self.vision.width, dim=dim, depth=depth, num_heads=num_heads, queries=queries + 1
        )
        self.projector = nn.Sequential(
            nn.Linear(dim, self.language.width),
            nn.GELU(approximate="tanh"),
            nn.Linear(self.language.width, self.language.width),
        )
        self.style = nn.Embedding(len(self.styles), self.language.width)
        nn.init.normal_(self.style.weight, std=0.02)
        self.style.weight.no_muon = True  # type: ignore[attr-defined]
        self.contrast = Contrast(dim=dim, text_dim=text_dim, vector_dim=vector_dim)
        around = max(sum(map(len, self.language.around(self.instructions.get(style, "")))) for style in self.styles)
        taken = around + queries + 1 + max_tokens + 1
        if self.language.places is not None and taken > self.language.places:
            raise ConfigError(
                f"captioner.max_tokens={max_tokens} and queries={queries} make {taken} places with what is around them,"
                f" and {language} reads {self.language.places}; lower them"
            )

    def read_stored(self, write: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Let what is trained whole begin with its stored weights; see `Tower.read_stored`."""
        for tower in (self.vision, self.language):
            tower.read_stored(write)

    def confirm(self) -> None:
        """Read what is frozen; see that it is what the weights, loaded since, go with."""
        for tower in (self.vision, self.language):
            tower.here()
            tower.bind()

    def record(self) -> dict[str, Any]:
        """Return what stands beside the weights: which nets they go with."""
        return {"vision": self.vision.record(), "language": self.language.record()}

    def size(self, caption: str) -> int:
        """Return how many of the language model's tokens a caption has."""
        return len(self.language.ids(caption))

    def look(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """Return the vectors that stand for clips `[B, Q, W]`, and what their own vectors are made of `[B, D]`.

        Raises:
            DataError: a clip has no frames.
        """
        frames = pixels.shape[2]
        if not frames:
            raise DataError(f"a clip of shape {tuple(pixels.shape)} has no frames; leave it out")
        fps = fps.to(pixels.device).clamp(min=1e-3)
        index, count = sample_frames(frames, fps, self.frame_rate, self.max_frames)
        real = torch.arange(index.shape[1], device=fps.device)[None] < count[:, None]
        clip, place = real.nonzero().unbind(1)
        chosen = index[clip, place]
        tokens_MPI = self.vision(pixels[clip, :, chosen])
        seconds = (chosen / fps[clip]).float()
        times_M2 = torch.stack([seconds, (frames - 1) / fps[clip].float() - seconds], dim=-1)
        per_frame = tokens_MPI.shape[1]
        packing = Packing.of([number * per_frame for number in count.tolist()])
        times = times_M2.repeat_interleave(per_frame, dim=0)
        answers = self.resampler(tokens_MPI.flatten(0, 1), times, packing)
        return self.projector(answers[:, 1:]), answers[:, 0]

    def asked(self, pooled_BQW: Tensor, styles: Sequence[str]) -> tuple[Tensor, list[str]]:
        """Return the vectors with each style's token behind them `[B, Q + 1, W]`, and what is asked in words."""
        token = self.style(self.style_ids(styles, pooled_BQW.device))[:, None]
        words = [self.instructions.get(style, "") for style in styles]
        return torch.cat([pooled_BQW, token.to(pooled_BQW.dtype)], dim=1), words

    def forward(
        self, pixels: Tensor, fps: Tensor, captions: Sequence[str], styles: Sequence[str], text_BD: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each clip's language loss (mean over its caption's tokens) and contrastive loss, `[B]` both, in nats.

        Args:
            pixels: `[B, 3, T, H, W]` in [-1, 1].
            fps: frames per second `[B]`.
            captions, styles: one a clip.
            text_BD: pooled features of the captions.
        """
        pooled_BQW, video_BD = self.look(pixels, fps)
        texts = [self.language.ids(caption) for caption in captions]
        losses_N, packing = self.language.losses(*self.asked(pooled_BQW, styles), texts, self.most)
        return packing.mean(losses_N), self.contrast(video_BD, text_BD, same_captions(captions, pixels.device))

    def write(
        self, pooled_BQD: Tensor, styles: Sequence[str], bounds: Sequence[int], **how: Any
    ) -> tuple[list[str], list[bool]]:
        """Return texts of at most so many tokens, and which came to their end; see `CaptionModel.write`."""
        written, ended = self.language.write(*self.asked(pooled_BQD, styles), bounds, **how)
        return [self.language.text(ids) for ids in written], ended
