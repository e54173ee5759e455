"""Writing texts one symbol after the other: what is chosen, when a text is over, and when it goes round in circles.

Symbols are bytes or a tokenizer's tokens. What becomes of a text depends on its own logits, bound and draw alone, never
on the texts that are written beside it.

Legend: B texts, V symbols.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

import torch
from torch import Tensor

from soratrain.batch import keyed_uniform

LOOKED = 8  # symbols after which texts are looked at for circles
CIRCLES = 4  # times that a text says the same at its end before it is given up
JOINERS = "\u200c\u200d"  # without a width, but part of words (Persian) and of pictures (families, flags)


def one_line(text: str) -> str:
    """Return a text on one line: control characters become spaces, other invisible ones nothing; its spaces all stay.

    Lone surrogates, which no encoding holds, become question marks.
    """
    kept = []
    for letter in text.encode("utf-8", "replace").decode("utf-8"):
        kind = "" if letter in JOINERS else unicodedata.category(letter)
        kept.append(" " if kind in ("Cc", "Zl", "Zp") else "" if kind == "Cf" else letter)
    return "".join(kept).strip()


def clean(text: str) -> str:
    """Return a text on one line, with one space where it has several."""
    return " ".join(one_line(text).split())


def choose(logits_BV: Tensor, chance_B: Tensor | None, top_p: float) -> Tensor:
    """Return the next symbol of each text, `[B]`: the likeliest, or by `chance_B` in [0, 1) among the nucleus.

    The nucleus is the smallest set of symbols whose probability reaches `top_p` (Holtzman et al., 2020).
    """
    if chance_B is None:
        return logits_BV.argmax(-1)
    probability, order = logits_BV.softmax(-1).sort(dim=-1, descending=True, stable=True)
    before = probability.cumsum(-1) - probability
    kept = torch.where(before < top_p, probability, 0.0).cumsum(-1)
    place = torch.searchsorted(kept, chance_B[:, None] * kept[:, -1:], right=True)
    return order.gather(1, place.clamp(max=order.shape[1] - 1))[:, 0]


def circles(symbols: Sequence[int], span: int) -> bool:
    """Return whether a text ends in the same symbols again and again: `CIRCLES` times, and for `span` symbols."""
    for unit in range(1, len(symbols) // CIRCLES + 1):
        if symbols[-1] != symbols[-1 - unit]:  # which is so of nearly all, and found without copying
            continue
        length = unit * max(CIRCLES, -(-span // unit))
        if length > len(symbols):
            continue
        tail = symbols[-length:]
        if tail[unit:] == tail[:-unit]:
            return True
    return False


class Writing:
    """The texts of a batch while they are written.

    Args:
        bounds: most symbols of each.
        end: the symbol that ends a text; it also stands in front of each, and behind what is over.
        span: symbols for which a text must repeat itself before it is given up.
        top_p: 0 takes the likeliest symbol, above 0 one is drawn from the nucleus.
        draws: what each text's chance depends on.

    Attributes:
        symbols: `[B, 1 + bound + 1]`, int64; column 0 is `end`.
        count: how many symbols each text has by now, those behind its end counted.
        ended: which came to their end.
    """

    def __init__(
        self,
        bounds: Sequence[int],
        device: torch.device,
        *,
        end: int,
        span: int,
        top_p: float = 0.0,
        draws: Sequence[int] = (),
    ) -> None:
        self.end, self.span, self.top_p, self.count = end, span, top_p, 0
        self.bounds, self.shortest = torch.tensor(bounds, device=device), min(bounds)
        self.symbols = torch.full((len(bounds), max(bounds) + 2), end, device=device)
        chances = [keyed_uniform(draw, "caption", (max(bounds) + 1,)) for draw in draws] if top_p else []
        self.chance = torch.stack(chances).to(device) if top_p else None
        self.ended = torch.zeros(len(bounds), dtype=torch.bool, device=device)
        self.over = torch.zeros_like(self.ended)  # ended, too long, or going round in circles

    @property
    def newest(self) -> Tensor:
        """The newest symbol of each text, `[B]`."""
        return self.symbols[:, self.count]

    def take(self, logits_BV: Tensor) -> bool:
        """Choose each text's next symbol; return whether all texts are over."""
        chance = None if self.chance is None else self.chance[:, self.count]
        following = choose(logits_BV, chance, self.top_p)
        self.ended |= (following == self.end) & ~self.over
        self.over |= self.ended
        if self.count >= self.shortest:
            self.over |= self.bounds <= self.count
        self.count += 1
        self.symbols[:, self.count] = following.masked_fill_(self.over, self.end)
        if self.count % LOOKED == 0:
            rows = self.symbols[:, 1 : self.count + 1].tolist()
            pairs = zip(rows, self.over.tolist(), strict=True)
            self.over |= torch.tensor(
                [not over and circles(row, self.span) for row, over in pairs], device=self.over.device
            )
        return bool(self.over.all())

    def texts(self) -> list[list[int]]:
        """Return the symbols of each text, up to its end."""
        rows = self.symbols[:, 1 : self.count + 1].tolist()
        return [row[: row.index(self.end)] if self.end in row else row for row in rows]
