"""What is measured of captions as texts: how near they are to the true ones, their language, and who finds whom.

BLEU-4, CIDEr-D and ROUGE-L are those of the COCO caption evaluation (Chen et al., 2015), by its own code, so that they
compare with published figures. Words are cut by rule instead of by Stanford's tokenizer, which wants Java: lower case,
no punctuation, every Chinese or Japanese letter a word.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

IDEOGRAPH = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]")
# What is written onto a letter (an accent, a vowel of Hindi, Thai or Arabic) or joins two belongs to their word.
ONTO = "".join(mark for mark in map(chr, range(0x300, 0xFFFF)) if unicodedata.category(mark) in ("Mn", "Mc"))
LETTERS = rf"[^\W_](?:[^\W_]|[{ONTO}\u200c\u200d])*"
WORD = re.compile(rf"{LETTERS}(?:['’-]{LETTERS})*")
RANKS = (1, 5, 10)
RUN = 4  # words; see `repeated`
LEAST = 1e-6  # below it a score is 0: BLEU's code takes 1e-15 for no match
MISSING = (
    "BLEU-4, CIDEr-D and ROUGE-L are left out: pycocoevalcap is not installed; install it with"
    " pip install 'soratrain[captions]'"
)


def words(text: str) -> list[str]:
    """Return the words of a text, as they are compared and counted."""
    return WORD.findall(IDEOGRAPH.sub(r" \g<0> ", unicodedata.normalize("NFC", text.lower())))


def can_score() -> bool:
    """Return whether the library that scores texts is installed."""
    return find_spec("pycocoevalcap") is not None


def text_scores(written: Sequence[str], true: Sequence[Sequence[str]]) -> dict[str, float | None]:
    """Return BLEU-4 of the corpus, and the means of CIDEr-D (0 to 10) and ROUGE-L over clips; what is below LEAST is 0.

    Args:
        written: one caption a clip.
        true: one or more captions of each. CIDEr-D weighs words by how rare they are in these, so it needs several
            clips, and compares only between captioners of the same clips; of one clip it is None.
    """
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    said = {clip: [" ".join(words(text))] for clip, text in enumerate(written)}
    wanted = {clip: [" ".join(words(text)) for text in texts] for clip, texts in enumerate(true)}
    bleu = Bleu(4).compute_score(wanted, said, verbose=0)[0][3]
    cider = Cider().compute_score(wanted, said)[0] if len(said) > 1 else None
    rouge = Rouge().compute_score(wanted, said)[0]
    found = {"bleu_4": bleu, "cider_d": cider, "rouge_l": rouge}
    return {name: None if value is None else 0.0 if value < LEAST else float(value) for name, value in found.items()}


def language(texts: Sequence[str]) -> dict[str, float]:
    """Return what the captions are like as language.

    words, the mean of those that are not empty; longest, in words; repeated, the share of runs of four words that were
    said before in the same caption (seq-rep-4; Welleck et al., 2020); vocabulary, different words; type_token, these
    over all words; distinct, different captions over all; empty, share of captions without a word.
    """
    cut = [words(text) for text in texts]
    spoken = [found for found in cut if found]
    counts = Counter(word for found in cut for word in found)
    return {
        "words": sum(map(len, spoken)) / max(len(spoken), 1),
        "longest": float(max(map(len, cut), default=0)),
        "repeated": sum(map(repeated, spoken)) / max(len(spoken), 1),
        "vocabulary": float(len(counts)),
        "type_token": len(counts) / max(counts.total(), 1),
        "distinct": len(set(map(tuple, cut))) / max(len(cut), 1),
        "empty": sum(not found for found in cut) / max(len(cut), 1),
    }


def repeated(found: Sequence[str]) -> float:
    """Return the share of runs of four words that stood before in the same text."""
    runs = [tuple(found[start : start + RUN]) for start in range(len(found) - RUN + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def pool_of(meanings: Sequence[Hashable], size: int) -> list[int]:
    """Return the first clips, at most `size`, whose captions mean different things; one that means nothing is left out.

    Args:
        meanings: what each clip's caption says; `tuple(words(text))` where no more is known of it.
    """
    first: dict[Hashable, int] = {}
    for clip, meaning in enumerate(meanings):
        if meaning:
            first.setdefault(meaning, clip)
    return sorted(first.values())[:size]


def recall(video_NE: Tensor, text_NE: Tensor) -> dict[str, Any]:
    """Return recall at 1, 5 and 10 among N pairs of unit vectors, both ways, and what chance gives.

    Another that is as near counts as nearer, and so does one that is no number: vectors that are all the same find
    nothing.
    """
    (videos, of_video), (texts, of_text) = (all_NE.unique(dim=0, return_inverse=True) for all_NE in (video_NE, text_NE))
    scores_NN = (videos @ texts.T).double()[of_video][:, of_text]  # the same vectors get the same score, to the bit
    own, others = torch.eye(len(scores_NN), dtype=torch.bool), float("inf")
    scores_NN = torch.where(scores_NN.isnan(), torch.where(own, -others, others), scores_NN)
    found: dict[str, Any] = {"clips": len(scores_NN)}
    for way, matrix in (("video_to_text", scores_NN), ("text_to_video", scores_NN.T)):
        nearer_N = (matrix >= matrix.diagonal()[:, None]).sum(1) - 1
        found[way] = {f"at_{rank}": float((nearer_N < rank).double().mean()) for rank in RANKS}
    return found | {"chance": {f"at_{rank}": min(rank / len(scores_NN), 1.0) for rank in RANKS}}
