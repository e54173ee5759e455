"""Captioners that say what they are told, for tests of what is measured of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from data_prep.world import Scene, World, describe, render
from soratrain.batch import to_uint8
from soratrain.data.buckets import Native
from soratrain.models import weights
from soratrain.models.captioner import Captioner
from soratrain.models.text import ByteTextEncoder
from soratrain.stages.evaluate_captioner import EvaluateCaptioner
from soratrain.stages.evaluate_captioner_text import can_score

CLIPS = 10


STYLES = ("short", "long")


needs_scores = pytest.mark.skipif(not can_score(), reason="pycocoevalcap is not installed")


class Teller(nn.Module):
    """In the place of a captioner: knows the scenes of the world, and says of them what it is told to say."""

    known_styles = STYLES

    def __init__(self, tell: Callable[[Scene, str], str]) -> None:
        super().__init__()
        self.tell = tell
        self.scenes = [World("demo").scene(index, split) for split in ("seen", "heldout") for index in range(CLIPS)]
        self.index = {render(scene).tobytes(): number for number, scene in enumerate(self.scenes)}

    def look(self, pixels: Tensor, fps: Tensor) -> tuple[Tensor, Tensor]:
        assert set(fps.tolist()) == {8.0}
        found = torch.tensor([self.index[clip.numpy().tobytes()] for clip in to_uint8(pixels)])
        return found[:, None, None].float(), found[:, None].float()

    def say(self, looked: Tensor, style: str) -> list[str]:
        return [self.tell(self.scenes[int(number)], style) for number in looked.flatten()]


class Finder(Teller):
    """One with a contrastive head, whose texts are read by `Reader`; `confused` takes every clip for the next one."""

    confused = 0

    def embed_video(self, pixels: Tensor, fps: Tensor) -> Tensor:
        numbers = (self.look(pixels, fps)[1][:, 0].long() + self.confused) % len(self.scenes)
        return torch.eye(len(self.scenes))[numbers]

    def embed_text(self, features: Tensor) -> Tensor:
        return features


class Reader(nn.Module):
    """Gives each true caption the vector of its clip."""

    def __init__(self, net: Teller) -> None:
        super().__init__()
        self.row = {describe(scene, style): n for style in STYLES for n, scene in enumerate(net.scenes)}
        self.size = len(net.scenes)

    def tokenize(self, texts: list[str]) -> list[str]:
        return texts

    def forward(self, texts: list[str]) -> tuple[Tensor, Reader]:
        return torch.eye(self.size)[[self.row[text] for text in texts]], self

    def mean(self, features: Tensor) -> Tensor:
        return features


class Page(HTMLParser):
    """What a page holds: marked words, players, headings, and the whole text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marks: list[str] = []
        self.videos, self.images, self.cards, self.bad, self.text = 0, 0, 0, 0, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.videos += tag == "video" and (given.get("src") or "").startswith("data:video/mp4;base64,")
        self.images += tag == "img" and (given.get("src") or "").startswith("data:image/png;base64,")
        self.cards += tag == "article"
        self.bad += tag == "article" and "bad" in (given.get("class") or "").split()
        if tag not in ("meta", "img", "br", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data
        if "mark" in self.open:
            self.marks.append(data)


def job(folder: Path, **changes) -> EvaluateCaptioner:
    values = {"shards": None, "buckets": Native(), "styles": None, "clips": CLIPS, "world": "auto", "world_seed": None}
    values |= {"pool": 64, "shown": 4, "short_bytes": 100, "batch_size": 8, "pixels_per_batch": 1 << 20, "seed": 0}
    return EvaluateCaptioner(out=str(folder / "out"), captioner=str(folder), device="cpu", **(values | changes))


def report_of(folder: Path) -> dict:
    return json.loads((folder / "out" / "report.json").read_text())


def page_of(folder: Path) -> Page:
    return Page((folder / "out" / "captions.html").read_text())


def tiny(folder: Path, styles: tuple[str, ...] = STYLES) -> Path:
    """Write a captioner that has learned nothing, and its text encoder."""
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    net = partial(Captioner, **sizes, queries=2, table=64, max_bytes=12, vector_dim=8, text_dim=16)
    text = partial(ByteTextEncoder, dim=16, depth=1, num_heads=2, table=64)
    torch.manual_seed(0)
    captioner = net()
    captioner.teach(["a disc"] * len(styles), styles)
    weights.save(folder / "weights", "captioner", captioner, net, {})
    weights.save(folder / "weights", "text", text(), text, {})
    return folder
