"""Byte-level text encoder, trained from scratch with the net that reads it: any Unicode text, no download.

A text is cut into segments (words, numbers, punctuation marks; at most 12 bytes each). A segment's token is the sum of
embeddings of its bytes by place and of hashed n-grams of its case-folded bytes (as the Byte Latent Transformer, Pagnoni
et al., 2024, embeds its patches), so a known word is one table look-up away and an unknown one is still spelled out.
A small bidirectional transformer then mixes the tokens. Every text opens with a learned token; the empty prompt is
that token alone, so it enters every graph.

Legend: L tokens of all texts, B texts, D width, H heads, K head dim.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.models.attention import Packing, attend
from soratrain.models.rope import rotate, rotations

SEGMENT_BYTES = 12
NGRAMS = (3, 5)
PIECES = re.compile(r"\w+|[^\w\s]")  # words and numbers of any script; other marks one by one; spaces only separate


def _hash(data: bytes) -> int:
    """Return the 32-bit FNV-1a hash, the same in every process and on every machine."""
    value = 0x811C9DC5
    for byte in data:
        value = (value ^ byte) * 0x01000193 & 0xFFFFFFFF
    return value ^ (value >> 15)


def _segments(word: str) -> list[str]:
    """Cut a word into segments of at most `SEGMENT_BYTES` bytes, never inside a character."""
    segments, size = [""], 0
    for character in word:
        width = len(character.encode("utf-8", "replace"))
        if size + width > SEGMENT_BYTES:
            segments.append("")
            size = 0
        segments[-1] += character
        size += width
    return segments


@lru_cache(maxsize=65536)
def _word_rows(word: str, table: int) -> tuple[tuple[int, ...], ...]:
    """Return, for each segment of a word, the table rows that are summed into its token."""
    rows = []
    for segment in _segments(word):
        data = segment.encode("utf-8", "replace")
        spelled = [place * 256 + byte for place, byte in enumerate(data)]
        folded = b"\x02" + segment.casefold().encode("utf-8", "replace") + b"\x03"
        grams = [folded] + [folded[i : i + n] for n in NGRAMS for i in range(len(folded) - n + 1) if n < len(folded)]
        hashed = [SEGMENT_BYTES * 256 + _hash(bytes([len(gram)]) + gram) % table for gram in grams]
        rows.append((*spelled, *hashed))
    return tuple(rows)


@dataclass(frozen=True)
class TextTokens:
    """Texts as numbers, before any network; picklable.

    Attributes:
        rows: table rows of all segments, concatenated `[R]`, int64.
        starts: where each segment's rows begin `[S]`, int64.
        lengths: tokens of each text, the opening token included; they sum to S + B.
        truncated: how many texts were cut at the longest length.
    """

    rows: Tensor
    starts: Tensor
    lengths: tuple[int, ...]
    truncated: int

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device | str) -> TextTokens:
        """Return the same with its tensors on `device`."""
        return TextTokens(self.rows.to(device), self.starts.to(device), self.lengths, self.truncated)

    def parts(self) -> list[Tensor]:
        """Return each text's rows `[R]`, int32, the first of a segment as -1 - row: one tensor, to be stored."""
        flagged = self.rows.clone()
        flagged[self.starts] = -1 - flagged[self.starts]
        ends = [*self.starts.tolist(), len(self.rows)]
        segments = list(accumulate(length - 1 for length in self.lengths))
        places = [ends[count] for count in (0, *segments)]
        return [part.to(torch.int32) for part in flagged.split([b - a for a, b in pairwise(places)])]

    @classmethod
    def joined(cls, parts: Sequence[Tensor]) -> TextTokens:
        """Return texts again from what `parts` gave for each; an empty one is the empty prompt."""
        flagged = torch.cat([part.to(torch.int64) for part in parts])
        rows = torch.where(flagged < 0, -1 - flagged, flagged)
        lengths = tuple(1 + int((part < 0).sum()) for part in parts)
        return cls(rows, (flagged < 0).nonzero()[:, 0], lengths, 0)

    @cached_property
    def packing(self) -> Packing:
        """How the tokens of the texts lie in `[L, D]`."""
        return Packing(self.lengths)


def tokenize(texts: Sequence[str], *, table: int, max_tokens: int) -> TextTokens:
    """Return `texts` as table rows; texts longer than `max_tokens` tokens are cut and counted."""
    rows: list[int] = []
    starts: list[int] = []
    lengths: list[int] = []
    truncated = 0
    for text in texts:
        count = 1
        for word in PIECES.finditer(text):
            segments = _word_rows(word.group(), table)
            room = max_tokens - count
            for segment in segments[:room]:
                starts.append(len(rows))
                rows.extend(segment)
            count += min(len(segments), room)
            if len(segments) > room:
                truncated += 1
                break
        lengths.append(count)
    return TextTokens(
        torch.tensor(rows, dtype=torch.int64), torch.tensor(starts, dtype=torch.int64), tuple(lengths), truncated
    )


class ByteTokens:
    """What stage=encode stores of a caption for `ByteTextEncoder`, which is trained along: its tokens.

    Args:
        table, max_tokens: as there.
    """

    def __init__(self, *, table: int = 4096, max_tokens: int = 256) -> None:
        self.table, self.max_tokens = table, max_tokens

    def identity(self) -> str:
        """Return what the tokens depend on."""
        return f"byte {self.table} {self.max_tokens}"

    def record(self) -> dict[str, Any]:
        """Return what is kept beside the stored tokens."""
        return {"kind": "byte", "table": self.table, "max_tokens": self.max_tokens}

    def store(self, texts: Sequence[str]) -> tuple[list[Tensor], set[int]]:
        """Return the tokens of each text, as `TextTokens.parts` has them, and the places of those that were cut."""
        found = tokenize(texts, table=self.table, max_tokens=self.max_tokens)
        full = [place for place, length in enumerate(found.lengths) if found.truncated and length == self.max_tokens]
        alone = {place: tokenize([texts[place]], table=self.table, max_tokens=self.max_tokens) for place in full}
        return found.parts(), {place for place, tokens in alone.items() if tokens.truncated}


class TextBlock(nn.Module):
    """Pre-norm bidirectional attention and MLP over ragged texts."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention = nn.RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)
        self.norm_mlp = nn.RMSNorm(dim)
        hidden = int(mlp_ratio * dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for zero in (self.out.weight, self.down.weight, self.down.bias):
            nn.init.zeros_(zero)

    def forward(self, x_LD: Tensor, packing: Packing, rotation: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x_LD)).unflatten(-1, (3, self.num_heads, -1))
        q_LHK, k_LHK, v_LHK = qkv.unbind(1)
        mixed = attend(rotate(q_LHK, rotation), rotate(k_LHK, rotation), v_LHK, packing, packing)
        x_LD = x_LD + self.out(mixed.flatten(1))
        return x_LD + self.down(F.gelu(self.up(self.norm_mlp(x_LD)), approximate="tanh"))


class ByteTextEncoder(nn.Module):
    """Texts in, one feature per segment out.

    Args:
        dim: width D of the features.
        depth: transformer blocks; 0 leaves the embeddings unmixed.
        num_heads: heads; `dim / num_heads` is even.
        mlp_ratio: hidden width of a block's MLP over `dim`.
        table: rows for hashed n-grams.
        max_tokens: longest text in tokens, the opening one included; the rest is cut and counted.
    """

    def __init__(
        self,
        *,
        dim: int,
        depth: int = 2,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        table: int = 4096,
        max_tokens: int = 256,
    ) -> None:
        super().__init__()
        if dim % (2 * num_heads):
            raise ValueError(f"text width {dim} does not give {num_heads} heads of even size")
        self.dim, self.num_heads, self.table, self.max_tokens = dim, num_heads, table, max_tokens
        self.embed = nn.EmbeddingBag(SEGMENT_BYTES * 256 + table, dim, mode="sum")
        self.opening = nn.Parameter(torch.randn(1, dim))
        self.norm_in = nn.RMSNorm(dim)
        self.blocks = nn.ModuleList(TextBlock(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth))
        self.norm_out = nn.RMSNorm(dim)
        nn.init.normal_(self.embed.weight, std=0.3)
        self.embed.weight.no_muon = True  # type: ignore[attr-defined]
        self.opening.no_muon = True  # type: ignore[attr-defined]

    def tokenize(self, texts: Sequence[str], stored: Sequence[Tensor | None] | None = None) -> TextTokens:
        """Return `texts` as table rows; pure, so that a loader's worker may call it.

        What is stored of them is not needed: it says the same, and making it anew costs less than moving it about.
        """
        return tokenize(texts, table=self.table, max_tokens=self.max_tokens)

    def forward(self, tokens: TextTokens) -> tuple[Tensor, Packing]:
        """Return the features of all texts `[L, D]` and how they are packed (`.cu_seqlens()`, `.mean(features)`)."""
        device = self.opening.device
        tokens, packing = tokens.to(device), tokens.packing
        x_LD = self.opening.new_zeros(packing.total, self.dim)
        first = packing.cu_seqlens(device)[:-1].long()
        x_LD = x_LD.index_copy(0, first, self.opening.expand(len(packing), -1))
        rest = torch.ones(packing.total, dtype=torch.bool, device=device).index_fill(0, first, False)
        x_LD = x_LD.index_copy(0, rest.nonzero()[:, 0], self.embed(tokens.rows, tokens.starts))
        x_LD = self.norm_in(x_LD)
        places = torch.cat([torch.arange(length, device=device) for length in packing.lengths])
        rotation = rotations(places[:, None], (self.dim // self.num_heads,))
        for block in self.blocks:
            x_LD = block(x_LD, packing, rotation)
        return self.norm_out(x_LD), packing
