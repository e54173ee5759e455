"""A recaption job by a chat server on loopback, and what it has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import data_tiny
from chat_server import grey, said, words

from soratrain.captions.openai import OpenAIEngine
from soratrain.data.buckets import Native
from soratrain.data.caption_table import open_captions
from soratrain.stages.recaption import Recaption

SHAPES = [(16, 16, 5), (16, 32, 9), (16, 16, 1), (32, 16, 5)] * 3


PROMPTS = {"short": "Say it in short.", "long": "Say it at length."}


def job(shards: Path, out: Path, url: str, *, attempts: int = 2, max_bad: float = 0.01, **changes: Any) -> Recaption:
    given = {"url": url, "frames_per_second": 8.0, "max_frames": 2, "backoff_s": 0.01, "retries": 1, **changes}
    return Recaption(
        out=str(out),
        shards=str(shards),
        engine=OpenAIEngine(**given),
        buckets=Native(),
        prompts=PROMPTS,
        attempts=attempts,
        max_bad=max_bad,
    )


def clip_of(body: dict[str, Any]) -> int:
    """Which clip a request is about; -1 before the first."""
    seen = grey(body)
    near = [number for number in range(len(SHAPES)) if abs(seen - data_tiny.grey(number, 0)) <= 3]
    return -1 if words(body).endswith("Describe it.") else near[0]


def style_of(body: dict[str, Any]) -> str:
    return "long" if words(body).endswith(PROMPTS["long"]) else "short"


def telling(body: dict[str, Any]) -> dict[str, Any]:
    """Say which clip and style was asked about."""
    return said(f"A {style_of(body)} view of clip {clip_of(body)}.")


def texts(out: Path) -> dict[tuple[int, str], str]:
    table = open_captions(out)
    rows = [row for number in range(len(SHAPES)) for row in table.get(data_tiny.key(number))]
    return {(int(row["key"], 16), row["type"]): row["text"] for row in rows}


WHOLE = {(number, style): f"A {style} view of clip {number}." for number in range(len(SHAPES)) for style in PROMPTS}


def listed(out: Path) -> list[dict[str, Any]]:
    file = out / "failures.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


BAD = {
    0: said(""),
    1: said("I’m sorry, but I can’t assist with that."),
    2: said("A red disc that moves", "length"),
    3: said("red disc, red disc, red disc, red disc"),
    4: said("word " * 10_000),
    5: said(None, "content_filter"),
}
