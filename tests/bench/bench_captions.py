"""Writing captions: with a key-value cache beside without, and ours beside transformers' own `generate`.

Every way writes `SYMBOLS` symbols for `BATCH` clips, greedily, and nothing ends before: no end is likely, and no circle
is looked for (the looking is timed, its finding is not). Rounds alternate. All nets have random weights: what they say
is nothing, what it costs is the same. That all ways say the same is seen before they are timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bench_vae import seconds
from torch import nn

from soratrain.compose import compose
from soratrain.models import caption_decoder, hf_language
from soratrain.run import instantiate

SYMBOLS, BATCH, QUERIES = 64, 8, 64
ROUNDS = {"coca_tiny": 9, "coca_b": 3, "vlm": 5}
LAYERS, WIDTH, WORDS = 6, 256, 8192
TITLE = (
    f"Captions written on a CPU, fp32, two threads: {BATCH} at once, {SYMBOLS} symbols each (bytes or tokens), greedy"
)
CACHED, UNCACHED, PEER = "ours, cached", "ours, uncached", "transformers, generate"
Ways = dict[str, Callable[[], list[list[int]]]]


def figures(values: list[float], digits: int) -> str:
    """Return the median (least to most)."""
    return f"{median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def coca(option: str) -> Ways:
    """Return the ways in which the body that is trained from nothing writes."""
    config, _ = compose(["stage=captioner", "machine=laptop", f"captioner={option}"])
    torch.manual_seed(0)
    net = instantiate(config["captioner"])().eval()
    for param in net.decoder.parameters():  # layers that begin at zero would all say the same
        if param.ndim > 1:
            nn.init.normal_(param, std=0.1)
    net.decoder.head.weight.data[caption_decoder.END] = 0.0
    pooled, styles = (
        net.bridge(torch.randn(BATCH, net.pooler.queries.shape[0] - 1, net.bridge.in_features)),
        [0] * BATCH,
    )

    def write(cached: bool) -> list[list[int]]:
        texts, _ = net.decoder.write(pooled, torch.tensor(styles), max_bytes=SYMBOLS, cached=cached)
        return [list(text) for text in texts]

    return {CACHED: partial(write, True), UNCACHED: partial(write, False)}


def language_model(folder: Path) -> Any:
    """Return our tower around a random language model that transformers has saved."""
    import vlm_parts_tiny
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": WIDTH, "intermediate_size": 4 * WIDTH, "num_hidden_layers": LAYERS}
    net = LlamaForCausalLM(
        LlamaConfig(**size, vocab_size=WORDS, num_attention_heads=4, num_key_value_heads=2, eos_token_id=None)
    )
    net.save_pretrained(folder)
    vlm_parts_tiny.tokenizer(ends=False).save_pretrained(folder)
    options = {"dtype": "fp32", "rank": 1, "alpha": 1.0, "targets": ()}
    return hf_language.LanguageTower(folder=str(folder), tuning="frozen", chat=False, **options)


def vlm(folder: Path) -> Ways:
    """Return the ways in which a language model goes on from vectors, and transformers' own."""
    tower = language_model(folder)
    tower.stop, tower.end, net = WORDS, None, tower.here()  # as of a text that has no end
    vectors = torch.randn(BATCH, QUERIES, WIDTH) * 0.02
    limits = {"max_new_tokens": SYMBOLS, "do_sample": False, "pad_token_id": 0, "use_cache": True}
    asked = {"inputs_embeds": vectors, "attention_mask": torch.ones(BATCH, QUERIES, dtype=torch.int64)}

    def write(cached: bool) -> list[list[int]]:
        return tower.write(vectors, [""] * BATCH, [SYMBOLS - 1] * BATCH, cached=cached)[0]

    def generate() -> list[list[int]]:
        return net.generate(**asked, **limits)[:, : SYMBOLS - 1].tolist()

    return {CACHED: partial(write, True), UNCACHED: partial(write, False), PEER: generate}


def timed(body: str, ways: Ways) -> list[dict[str, str]]:
    """Return a row a way, measured in turn."""
    said = {name: way() for name, way in ways.items()}
    first = said[CACHED]
    assert all(len(text) >= SYMBOLS - 1 for text in first), "a text ended before the others"
    took: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS[body.partition(":")[0]]):
        for name, way in ways.items():
            took[name].append(seconds(way))
    rows = []
    for name, spent in took.items():
        row = {"body": body, "way": name, "captions/s": figures([BATCH / one for one in spent], 2)}
        if name != CACHED:
            row["cached / this"] = figures([b / a for a, b in zip(took[CACHED], spent, strict=True)], 2)
            row["note"] = "the same texts" if said[name] == first else "other texts"
        rows.append(row)
    return rows


def measure() -> list[dict[str, str]]:
    """Return the table."""
    spans = caption_decoder.CIRCLING, hf_language.CIRCLING
    caption_decoder.CIRCLING = hf_language.CIRCLING = 10**9
    try:
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            rows = [row for body in ("coca_tiny", "coca_b") for row in timed(body, coca(body))]
            try:
                rows += timed(f"vlm: LLaMA of {LAYERS} x {WIDTH}, {QUERIES} queries", vlm(Path(folder)))
            except ImportError:
                rows.append({"body": "vlm", "note": "transformers is not installed"})
    finally:
        caption_decoder.CIRCLING, hf_language.CIRCLING = spans
    return [
        {name: row.get(name, "") for name in ("body", "way", "captions/s", "cached / this", "note")} for row in rows
    ]
