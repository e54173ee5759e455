"""What every captioner has in common, whatever its body: styles, how long captions get, clips and texts in one space.

Two bodies show this face: `Captioner`, which is trained from nothing, and `VLM`, which joins a vision encoder and a
language model of Hugging Face. Whoever trains, captions or measures sees the face alone.

Legend: B clips, Q pooled queries, D width, E vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.errors import ConfigError


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
        """Return each clip's loss `[B]`; pairs marked in `same_BB` are no negatives.

        Negatives are the other clips of the same micro-batch, never those of other ranks: which clips stand in a
        micro-batch does not depend on the number of ranks, so neither does the loss.
        """
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


class CaptionModel(nn.Module):
    """A captioner's face; a body adds `look`, `write`, `size` and `forward`, and a `Contrast` as `self.contrast`.

    Args:
        styles: kinds of caption that can be asked for; the order is stored in the weights, so only append.
        longest: of a caption, in the body's symbols (`size`); what is longer is cut while training.

    Raises:
        ConfigError: a style is named twice, or none is.
    """

    longest: Tensor
    contrast: Contrast

    def __init__(self, *, styles: Sequence[str], longest: int) -> None:
        super().__init__()
        if not styles:
            raise ConfigError("captioner.styles=[] names no style; name one or more: captioner.styles=[short,long]")
        if len(set(styles)) != len(styles):
            raise ConfigError(f"captioner.styles={list(styles)} must name each style once")
        self.styles, self.most = tuple(styles), longest
        self.register_buffer("longest", torch.zeros(len(self.styles)))

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

    def read_stored(self, write: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Let parts that others have trained, and that are trained on, begin with their weights; not after `init`.

        Args:
            write: called with each parameter or buffer and its whole values, where a process may hold a slice of it.

        Raises:
            DataError: they cannot be read.
        """

    def confirm(self) -> None:
        """Read, before training, what is others' and stays as it is.

        Raises:
            DataError: it cannot be read, or is another than these weights go with.
        """

    def record(self) -> dict[str, Any]:
        """Return what stands beside the weights: whose nets they go with."""
        return {}

    def size(self, caption: str) -> int:
        """Return how long a caption is, in the body's symbols, its end not counted."""
        raise NotImplementedError

    def teach(self, captions: Sequence[str], styles: Sequence[str]) -> int:
        """Remember how long captions of each style have been, and return how many of them are too long to be read.

        A style without any caption is not worth asking for.
        """
        longest, longer = self.longest.tolist(), 0
        for style, caption in zip(self.style_ids(styles).tolist(), captions, strict=True):
            size = self.size(caption)
            longest[style] = max(longest[style], size)
            longer += size > self.most
        self.longest.copy_(torch.tensor(longest))
        return longer

    @property
    def known_styles(self) -> tuple[str, ...]:
        """The styles that this captioner was trained on."""
        return tuple(style for style, length in zip(self.styles, self.longest.tolist(), strict=True) if length)

    def bound(self, style: str) -> int:
        """Return after how many symbols a caption of `style` has lost its way: a quarter above the longest learned.

        Raises:
            ConfigError: a style that this captioner does not have.
        """
        length = float(self.longest[int(self.style_ids([style]))])
        return min(self.most, int(1.25 * length) + 16) if length else self.most

    def look(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        """Return what captions of clips are written from `[B, Q, width]`, and what their vectors are of `[B, D]`.

        Args:
            pixels: `[B, 3, T, H, W]` in [-1, 1].
            fps: frames per second `[B]`.
        """
        raise NotImplementedError

    def write(
        self, pooled_BQD: Tensor, styles: Sequence[str], bounds: Sequence[int], **how: Any
    ) -> tuple[list[str], list[bool]]:
        """Return a text in each style, of at most so many symbols, and which of them came to their end.

        Args:
            how: `top_p`, `draws` and `cached` of `say`.
        """
        raise NotImplementedError

    @torch.no_grad()
    def say(
        self,
        pooled_BQD: Tensor,
        style: str | Sequence[str],
        *,
        top_p: float = 0.0,
        draws: Sequence[int] = (),
        cached: bool = True,
    ) -> list[str]:
        """Return the captions of clips that have been looked at.

        One that does not come to its end (within `bound`, and without going round in circles) comes back empty: half
        a sentence is no description.

        Args:
            pooled_BQD: what `look` returned first.
            style: the kind of caption, of all or of each.
            top_p: 0 takes the likeliest symbol; above 0 symbols are drawn from the nucleus.
            draws: what each clip's chance depends on; needed where `top_p` is above 0.
            cached: False computes every place anew for every symbol: the same captions, slowly.
        """
        styles = [style] * len(pooled_BQD) if isinstance(style, str) else list(style)
        bounds = [self.bound(name) for name in styles]
        texts, ended = self.write(pooled_BQD, styles, bounds, top_p=top_p, draws=draws, cached=cached)
        return [text if whole else "" for text, whole in zip(texts, ended, strict=True)]

    def embed_video(self, pixels: Tensor, fps: Tensor) -> Tensor:
        """Return unit vectors of clips, `[B, E]`."""
        return F.normalize(self.contrast.video(self.look(pixels, fps)[1]).float(), dim=-1)

    def embed_text(self, text_BD: Tensor) -> Tensor:
        """Return unit vectors of texts from their pooled features, `[B, E]`."""
        return F.normalize(self.contrast.text(text_BD).float(), dim=-1)

    @torch.no_grad()
    def generate(self, pixels: Tensor, fps: Tensor, style: str, **options: Any) -> list[str]:
        """Return a caption of each clip `[B, 3, T, H, W]` in [-1, 1]; `options` are those of `say`."""
        return self.say(self.look(pixels, fps)[0], style, **options)


def same_captions(captions: Sequence[str], device: torch.device) -> Tensor:
    """Return which pairs of clips are no negatives of each other, `[B, B]`: of one caption, or one of them of none."""
    numbers: dict[str, int] = {"": 0}
    found = torch.tensor([numbers.setdefault(caption, len(numbers)) for caption in captions], device=device)
    silent = found == 0
    return (found[:, None] == found) | silent[:, None] | silent
