"""The text side of the captioner: bytes written one after the other, and read again only from a cache.

A caption is its UTF-8 bytes, so any script can be written and nothing is out of vocabulary.

Legend: B clips, D width, H heads, K head dim, Q pooled queries, L new places, S places read so far, N new places of
all texts without padding, V symbols.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from soratrain.models.attention import Packing, attend
from soratrain.models.few_rows import Ordered
from soratrain.models.rope import rotate, rotations
from soratrain.models.writing import Writing, clean

START, END, SYMBOLS = 256, 256, 257  # a caption's bytes, then END; START stands before the first byte
NGRAMS = (2, 3, 4)
CIRCLING = 24  # bytes for which a caption must repeat itself before it is given up


def norm(dim: int) -> nn.LayerNorm:
    """Return a norm without bias; a LayerNorm, since forward and backward are one kernel each on every device."""
    return nn.LayerNorm(dim, bias=False)


def encode_captions(captions: Sequence[str], max_bytes: int) -> tuple[Tensor, Tensor, Packing]:
    """Return what the decoder reads `[B, L]` (START, then bytes), what it should answer `[N]`, and the real lengths.

    A caption longer than `max_bytes` is cut, and its END is then not asked for: the net must not learn to break off.
    """
    coded = [caption.encode("utf-8", "replace") for caption in captions]
    read = [[START, *data][: max_bytes + (len(data) <= max_bytes)] for data in coded]
    answers = [[*data[: len(line)], END][: len(line)] for data, line in zip(coded, read, strict=True)]
    packing = Packing.of([len(line) for line in read])
    symbols = packing.pad(torch.tensor([symbol for line in read for symbol in line]))
    return symbols, torch.tensor([symbol for line in answers for symbol in line]), packing


def decode_caption(data: bytes) -> str:
    """Return a caption's text: broken UTF-8 is left out, and what is left is cleaned."""
    return clean(data.decode("utf-8", "ignore"))


class Block(nn.Module):
    """Pre-norm attention with normed, turned queries and keys, and an MLP."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm_attention, self.norm_mlp = norm(dim), norm(dim)
        self.norm_q, self.norm_k = norm(dim // num_heads), norm(dim // num_heads)
        self.qkv, self.out = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        hidden = int(mlp_ratio * dim)
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        for last in (self.out, self.down):
            nn.init.zeros_(last.weight)

    def turned(self, x_ND: Tensor, rotation: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values, `[N, H, K]` each."""
        qkv = self.qkv(self.norm_attention(x_ND)).unflatten(-1, (3, self.num_heads, -1))
        q_NHK, k_NHK, v_NHK = qkv.unbind(1)
        q_NHK, k_NHK = rotate(self.norm_q(q_NHK), rotation), rotate(self.norm_k(k_NHK), rotation)
        return q_NHK.to(v_NHK.dtype), k_NHK.to(v_NHK.dtype), v_NHK

    def mlp(self, x: Tensor) -> Tensor:
        return x + self.down(F.gelu(self.up(self.norm_mlp(x)), approximate="tanh"))

    def forward(self, x_ND: Tensor, packing: Packing, rotation: Tensor) -> Tensor:
        mixed = attend(*self.turned(x_ND, rotation), packing, packing)
        return self.mlp(x_ND + self.out(mixed.flatten(1)))


class Cache:
    """Keys and values of the places already read, one pair `[B, H, S, K]` a block, so that no byte is read twice.

    It also holds what else is made once for all steps of `rows` texts: rotations, and large weights in a faster order.
    """

    def __init__(self, blocks: int, capacity: int, rows: int) -> None:
        self.capacity, self.length = capacity, 0
        self.product = Ordered(rows)
        self.stored: list[tuple[Tensor, Tensor] | None] = [None] * blocks
        self.turns: Tensor | None = None

    def rotation(self, channels: tuple[int, ...], device: torch.device) -> Tensor:
        """Return by how much queries and keys turn at each place `[S, 1, K / 2, 2]`, made once."""
        if self.turns is None:
            self.turns = rotations(torch.arange(self.capacity, device=device)[:, None], channels)
        return self.turns

    def extend(self, block: int, k_BHLK: Tensor, v_BHLK: Tensor) -> tuple[Tensor, Tensor]:
        """Store the newest keys and values and return all of them; `length` moves when the last block has stored."""
        entry = self.stored[block]
        if entry is None:
            shape = (*k_BHLK.shape[:2], self.capacity, k_BHLK.shape[3])
            entry = self.stored[block] = (k_BHLK.new_empty(shape), v_BHLK.new_empty(shape))
        end = self.length + k_BHLK.shape[2]
        for held, new in zip(entry, (k_BHLK, v_BHLK), strict=True):
            held[:, :, self.length : end] = new
        if block == len(self.stored) - 1:
            self.length = end
        return entry[0][:, :, :end], entry[1][:, :, :end]


class DecoderBlock(Block):
    """A causal block that also reads the clip's pooled answers."""

    def __init__(self, *, dim: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio)
        self.norm_cross = norm(dim)
        self.norm_cross_q, self.norm_cross_k = norm(dim // num_heads), norm(dim // num_heads)
        self.cross_q, self.cross_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.cross_out = nn.Linear(dim, dim, bias=False)

    def read(self, memory_BQD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the keys and values of the pooled answers, `[B, H, Q, K]` each; once a clip is enough."""
        k, v = self.cross_kv(memory_BQD).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return self.norm_cross_k(k).to(v.dtype).transpose(1, 2), v.transpose(1, 2)

    def forward(  # type: ignore[override]
        self,
        x_ND: Tensor,
        packing: Packing,
        rotation: Tensor,
        memory: tuple[Tensor, Tensor],
    ) -> Tensor:
        q, k, v = (packing.pad(part).transpose(1, 2) for part in self.turned(x_ND, rotation))
        x_ND = x_ND + self.out(packing.unpad(_look(q, k, v, causal=True).transpose(1, 2)).flatten(1))
        asked_NHK = self.norm_cross_q(self.cross_q(self.norm_cross(x_ND)).unflatten(-1, (self.num_heads, -1)))
        asked = packing.pad(asked_NHK.to(memory[0].dtype)).transpose(1, 2)
        told = packing.unpad(_look(asked, *memory, causal=False).transpose(1, 2))
        return self.mlp(x_ND + self.cross_out(told.flatten(1)))

    def step(self, x_BD: Tensor, rotation: Tensor, memory: tuple[Tensor, Tensor], cache: Cache, index: int) -> Tensor:
        """Return what `forward` does at the newest place of each text, `[B, D]`, those before it being in the cache.

        Of so few numbers most of the time goes to calling things: layers are applied without being called.
        """
        heads, product = (self.num_heads, -1), cache.product
        qkv = product(_normed(x_BD, self.norm_attention), self.qkv).unflatten(-1, (3, *heads))
        q_BHK, k_BHK, v_BHK = qkv.unbind(1)
        q_BHK = rotate(_normed(q_BHK, self.norm_q), rotation).to(v_BHK.dtype)
        k_BHK = rotate(_normed(k_BHK, self.norm_k), rotation).to(v_BHK.dtype)
        k_BHSK, v_BHSK = cache.extend(index, k_BHK[:, :, None], v_BHK[:, :, None])
        mixed = _look(q_BHK[:, :, None], k_BHSK, v_BHSK, causal=False)
        x_BD = x_BD + product(mixed.flatten(1), self.out)
        asked = product(_normed(x_BD, self.norm_cross), self.cross_q).unflatten(-1, heads)
        told = _look(_normed(asked, self.norm_cross_q).to(memory[0].dtype)[:, :, None], *memory, causal=False)
        x_BD = x_BD + product(told.flatten(1), self.cross_out)
        inner = F.gelu(product(_normed(x_BD, self.norm_mlp), self.up), approximate="tanh")
        return x_BD + product(inner, self.down)


def _normed(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(x, layer.normalized_shape, layer.weight, None, layer.eps)


def _look(q_BHLK: Tensor, k_BHSK: Tensor, v_BHSK: Tensor, *, causal: bool) -> Tensor:
    """Attend over short texts; a causal query stands at its own key.

    In bf16 on CPU plain products are faster than SDPA, as `attention.py` explains.
    """
    queries = q_BHLK.shape[-2]
    if q_BHLK.is_cuda or q_BHLK.dtype == torch.float32:
        return F.scaled_dot_product_attention(q_BHLK, k_BHSK, v_BHSK, is_causal=causal)
    scores = (q_BHLK * (1 / math.sqrt(q_BHLK.shape[-1]))) @ k_BHSK.transpose(-1, -2)
    if causal:
        later = torch.ones(queries, queries, dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(later, float("-inf"))
    return scores.softmax(-1).to(v_BHSK.dtype) @ v_BHSK


class Decoder(nn.Module):
    """Causal transformer over a caption's bytes, each known with the few before it (hashed n-grams).

    The n-grams are the Byte Latent Transformer's trick (Pagnoni et al., 2024): words need no depth to be recognised.
    """

    def __init__(self, *, dim: int, depth: int, num_heads: int, mlp_ratio: float, styles: int, table: int) -> None:
        super().__init__()
        self.table, self.channels = table, (dim // num_heads,)
        self.bytes, self.ngrams, self.style = (
            nn.Embedding(SYMBOLS, dim),
            nn.Embedding(table, dim),
            nn.Embedding(styles, dim),
        )
        self.blocks = nn.ModuleList(
            DecoderBlock(dim=dim, num_heads=num_heads, mlp_ratio=mlp_ratio) for _ in range(depth)
        )
        self.norm_in, self.norm_out = norm(dim), norm(dim)
        self.head = nn.Linear(dim, SYMBOLS, bias=False)
        nn.init.zeros_(self.head.weight)
        for weight in (self.bytes.weight, self.ngrams.weight, self.style.weight, self.head.weight):
            weight.no_muon = True  # type: ignore[attr-defined]

    def embed(self, symbols_BS: Tensor, styles_B: Tensor, packing: Packing) -> Tensor:
        """Return the inputs `[N, D]` of all places."""
        hashes, code = [], symbols_BS
        for n in range(2, max(NGRAMS) + 1):
            earlier = F.pad(symbols_BS, (n - 1, 0), value=START)[:, : symbols_BS.shape[1]]
            code = (code * 1_000_003 + earlier * 8191 + n) % 2_147_483_647
            hashes.append(code % self.table)
        rows_N3 = packing.unpad(torch.stack(hashes, dim=-1))
        symbols_N = packing.unpad(symbols_BS)
        opening = self.style(packing.expand(styles_B)) * (symbols_N == START)[:, None]
        return self.norm_in(self.bytes(symbols_N) + self.ngrams(rows_N3).sum(1) + opening)

    def memory(self, pooled_BQD: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Return what each block reads of the clips."""
        blocks: Iterable[DecoderBlock] = self.blocks  # type: ignore[assignment]
        return [block.read(pooled_BQD) for block in blocks]

    def forward(
        self,
        symbols_BS: Tensor,
        styles_B: Tensor,
        memory: Sequence[tuple[Tensor, Tensor]],
        packing: Packing,
    ) -> Tensor:
        """Return logits `[N, 257]` of the symbol after each place; texts are read from START."""
        x_ND = self.embed(symbols_BS, styles_B, packing)
        places = packing.unpad(torch.arange(packing.longest, device=x_ND.device).expand(len(packing), -1))
        rotation = rotations(places[:, None], self.channels)
        for block, read in zip(self.blocks, memory, strict=True):
            x_ND = block(x_ND, packing, rotation, read)
        return self.head(self.norm_out(x_ND)).float()

    def step(
        self,
        symbols_BS: Tensor,
        styles_B: Tensor,
        memory: Sequence[tuple[Tensor, Tensor]],
        cache: Cache,
    ) -> Tensor:
        """Return logits `[B, 257]` of the symbol after each text's newest place, which the cache holds from then on.

        Args:
            symbols_BS: from START.
        """
        place, code, rows = cache.length, symbols_BS[:, -1], []
        x_BD = self.bytes(code)
        for n in range(2, max(NGRAMS) + 1):
            earlier = symbols_BS[:, -n] * 8191 if n <= symbols_BS.shape[1] else START * 8191
            code = (code * 1_000_003 + earlier + n) % 2_147_483_647
            rows.append(code)
        x_BD = x_BD + self.ngrams(torch.stack(rows, dim=-1) % self.table).sum(1)
        x_BD = self.norm_in(x_BD + self.style(styles_B) if place == 0 else x_BD)
        rotation = cache.rotation(self.channels, x_BD.device)[place : place + 1]
        for index, (block, read) in enumerate(zip(self.blocks, memory, strict=True)):
            x_BD = block.step(x_BD, rotation, read, cache, index)  # type: ignore[operator]
        return self.head(self.norm_out(x_BD)).float()

    @torch.inference_mode()
    def write(
        self,
        pooled_BQD: Tensor,
        styles_B: Tensor,
        *,
        max_bytes: int | Sequence[int],
        top_p: float = 0.0,
        draws: Sequence[int] = (),
        cached: bool = True,
    ) -> tuple[list[bytes], list[bool]]:
        """Write a caption for each clip, and say which came to their end.

        Args:
            max_bytes: most that a caption may have, all or each.
            top_p: 0 takes the likeliest byte; above 0 bytes are drawn from the nucleus.
            draws: what each clip's chance depends on; needed where `top_p` is above 0.
            cached: False computes every place anew at every byte: the same captions, slowly.
        """
        batch = len(styles_B)
        bounds = [max_bytes] * batch if isinstance(max_bytes, int) else list(max_bytes)
        writing = Writing(bounds, styles_B.device, end=END, span=CIRCLING, top_p=top_p, draws=draws)
        memory, cache = self.memory(pooled_BQD), Cache(len(self.blocks), max(bounds) + 1, batch) if cached else None
        over = False
        while not over:
            read = writing.symbols[:, : writing.count + 1]
            if cache is not None:
                logits = self.step(read, styles_B, memory, cache)
            else:
                whole = Packing.of([read.shape[1]] * batch)
                logits = whole.pad(self(read, styles_B, memory, whole))[:, -1]
            over = writing.take(logits)
        return [bytes(row) for row in writing.texts()], writing.ended.tolist()
