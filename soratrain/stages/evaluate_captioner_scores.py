"""From captions to figures: of one set of clips, style by style."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from data_prep.world import Judgement, Seen, judge, read_caption
from data_prep.world.judging import ATTRIBUTES
from soratrain.stages.evaluate_captioner_clips import true_captions
from soratrain.stages.evaluate_captioner_text import can_score, language, pool_of, recall, text_scores, words

T = TypeVar("T")
OTHERS = 8  # other clips' captions that stand for guessing, of each clip


@dataclass(frozen=True, eq=False)
class Told:
    """What was said of a clip.

    Attributes:
        name: of the clip.
        captions: (type, text) of the true ones.
        truth: what is to be seen in it, where that is known.
        texts: the captioner's, by style that the clip was asked for.
        vector: of the clip, `[E]`, where there is a contrastive head.
    """

    name: str
    captions: tuple[tuple[str, str], ...]
    truth: Seen | None
    texts: dict[str, str]
    vector: Tensor | None = None


def measure(
    told: Sequence[Told], styles: Sequence[str], short_bytes: int, pool: int, net: Any, text: nn.Module | None
) -> dict[str, Any]:
    """Return the figures of a set of clips.

    Args:
        pool: clips of distinct captions among which one is looked for.
        net, text: the captioner and what reads texts for it; None where it has no contrastive head.
    """
    found: dict[str, Any] = {"clips": len(told), "styles": {}, "recall": {}}
    for style in styles:
        asked = [one for one in told if style in one.texts]
        pairs = [(one, true) for one in asked if (true := comparable(one, style, short_bytes))]
        texts, own = [one.texts[style] for one, _ in pairs], [true for _, true in pairs]
        found["styles"][style] = {
            "asked": len(asked),
            "language": language([one.texts[style] for one in asked]),
            "compared": len(pairs),
            "true": language([true[0] for true in own]) if pairs else None,
            "scores": text_scores(texts, own) if pairs and can_score() else None,
            "another": text_scores([true[0] for true in rolled(own, 1)], own) if len(own) > 1 and can_score() else None,
            "world": of_world(asked, style, short_bytes),
        }
        if text is not None:
            found["recall"][style] = found_again(pairs, pool, net, text)
    return found


def comparable(one: Told, style: str, short_bytes: int) -> list[str]:
    """Return the true captions of a style that hold a word, without which nothing can be compared."""
    return [text for text in true_captions(one.captions, style, short_bytes) if words(text)]


def of_world(told: Sequence[Told], style: str, short_bytes: int) -> dict[str, Any] | None:
    """Return what is named rightly and what is invented: by the captioner, by true captions, by another clip's."""
    judged = [(one.texts[style], one.truth) for one in told if one.truth is not None]
    if not judged:
        return None
    true = [
        (texts[0], one.truth)
        for one in told
        if one.truth is not None and (texts := true_captions(one.captions, style, short_bytes))
    ]
    others = min(OTHERS, len(true) - 1)
    guessed = [
        (text, truth)
        for by in range(1, others + 1)
        for (text, _), (_, truth) in zip(rolled(true, by), true, strict=True)
    ]
    return {
        name: means(judge(text, truth) for text, truth in pairs) if pairs else None
        for name, pairs in (("ours", judged), ("true", true), ("another", guessed))
    }


def means(judgements: Iterable[Judgement]) -> dict[str, float | None]:
    """Return each attribute's mean over the clips that have it, and the share of named objects that are not there."""
    judgements = list(judgements)
    scores: dict[str, float | None] = {}
    for name in ATTRIBUTES:
        values = [one.scores[name] for one in judgements if name in one.scores]
        if values:
            scores[name] = float(np.mean(values))
    named = sum(one.named for one in judgements)
    return scores | {"invented": sum(one.invented for one in judgements) / named if named else None}


def rolled(items: Sequence[T], by: int) -> list[T]:
    """Return the items, each at the place of the one `by` before it."""
    return [*items[by:], *items[:by]]


@torch.inference_mode()
def found_again(
    pairs: Sequence[tuple[Told, Sequence[str]]], pool: int, net: Any, text: nn.Module
) -> dict[str, Any] | None:
    """Return how often a clip finds its caption, and a caption its clip; None of fewer than two distinct captions."""
    texts = [true[0] for _, true in pairs]
    known = [one.truth is not None for one, _ in pairs]  # of the world: a paraphrase is no other caption
    read = [read_caption(text) if seen else tuple(words(text)) for text, seen in zip(texts, known, strict=True)]
    places = pool_of([None if meaning == Seen() else meaning for meaning in read], pool)
    if len(places) < 2:
        return None
    features, packing = text(text.tokenize([texts[place] for place in places]))  # type: ignore[operator]
    text_NE = net.embed_text(packing.mean(features)).float().cpu()
    vectors = [vector for place in places if (vector := pairs[place][0].vector) is not None]
    return recall(torch.stack(vectors), text_NE)


def faults(one: Told, short_bytes: int) -> float:
    """Return how wrong a clip's captions are, to find the worst: wrong phrases, or words that no true caption has."""
    total = 0.0
    for style, text in one.texts.items():
        if one.truth is not None:
            judged = judge(text, one.truth)
            total += len(judged.wrong) + judged.invented + (not words(text)) * 10
        elif true := true_captions(one.captions, style, short_bytes):
            total += 1 - max(overlap(text, other) for other in true)
    return total


def overlap(one: str, other: str) -> float:
    """Return the F1 score of the words that two texts share, 0 to 1."""
    first, second = Counter(words(one)), Counter(words(other))
    return 2 * (first & second).total() / max(first.total() + second.total(), 1)
