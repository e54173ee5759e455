"""stage=evaluate target=captioner: how good captions are, of clips whose true captions are known.

On any shards: how near texts are to the true ones, what they are like as language, and whether the contrastive head
finds the caption of a clip and the clip of a caption. On new scenes of the world, whose truth is known, also what is
named rightly and which objects are invented, beside the true captions (the ceiling) and another clip's (guessing).
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

from soratrain import outputs
from soratrain.batch import to_pixels
from soratrain.data.atomic import replacing
from soratrain.data.buckets import Buckets
from soratrain.data.remote import Remote
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.stages.evaluate_captioner_clips import (
    SPLITS,
    Clips,
    Item,
    OfShards,
    OfWorld,
    asked_of,
    batches,
    world_of,
)
from soratrain.stages.evaluate_captioner_gallery import Gallery
from soratrain.stages.evaluate_captioner_page import write_page
from soratrain.stages.evaluate_captioner_scores import Told, measure
from soratrain.stages.evaluate_captioner_shown import chief_of, said_in, show
from soratrain.stages.evaluate_captioner_text import MISSING, can_score
from soratrain.stages.pace import progress
from soratrain.stages.vae_summary import plain

log = logging.getLogger(__name__)
CHIEF = ("color", "shape", "number", "motion", "size", "camera", "invented")


class EvaluateCaptioner:
    """The job.

    Args:
        out: the stage's folder; gets `report.json` and `captions.html`.
        captioner: folder of the captioner's weights, and of its text encoder where it has one.
        shards: folders or URLs of clips with captions; None for none.
        buckets: how their sizes are chosen.
        styles: kinds of caption to ask for; None asks for all that the captioner was trained on.
        clips: of the shards, drawn by `seed`, and of each split of the world.
        world, world_seed: see `world_of`.
        pool: clips of distinct captions among which one is looked for.
        shown: clips of each kind on the page.
        short_bytes: an original caption is held against `short` up to this many bytes, above against `long`.
        batch_size, pixels_per_batch: clips and pixels worked on at once.
        precision: `bf16-mixed` works under autocast, `32-true` does not.
        device: `auto` takes CUDA where there is one.
        remote: how shards in a store are read.

    Raises:
        ConfigError: a value out of range, or nothing to evaluate on.
    """

    def __init__(
        self,
        *,
        out: str,
        captioner: str,
        shards: str | list[str] | None,
        buckets: Buckets,
        styles: Sequence[str] | None,
        clips: int,
        world: str | None,
        world_seed: int | None,
        pool: int,
        shown: int,
        short_bytes: int,
        batch_size: int,
        pixels_per_batch: int,
        seed: int,
        precision: str = "32-true",
        device: str = "auto",
        remote: Remote | None = None,
    ) -> None:
        least = {"clips": (clips, 1), "pool": (pool, 2), "shown": (shown, 0), "batch_size": (batch_size, 1)}
        for name, (value, bound) in (least | {"pixels_per_batch": (pixels_per_batch, 1)}).items():
            if value < bound:
                raise ConfigError(f"stage.job.{name}={value} must be at least {bound}")
        if shards is None and world is None:
            raise ConfigError(
                "inputs.shards=null with stage.job.world=null: nothing is left to evaluate on; give shards, or"
                " stage.job.world=demo"
            )
        if styles is not None and not styles:
            raise ConfigError("stage.job.styles=[] asks for no captions; name some, or leave it out for all")
        self.out, self.captioner = Path(out), captioner
        self.places = [] if shards is None else [shards] if isinstance(shards, str) else list(shards)
        self.buckets, self.styles, self.clips = buckets, styles, clips
        self.world, self.world_seed = world, world_seed
        self.pool, self.shown, self.short_bytes = pool, shown, short_bytes
        self.batch_size, self.pixels_per_batch, self.seed, self.remote = batch_size, pixels_per_batch, seed, remote
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.autocast = precision.startswith("bf16")

    def __call__(self) -> dict[str, Any]:
        """Describe, measure and write everything; return the chief figures.

        Raises:
            ConfigError: the net is no captioner, or was not trained on a style.
            DataError: no clip of the shards has a caption.
        """
        net = weights.load(self.captioner, "captioner", self.device)[0]
        styles = self.asked(net)
        text, silent = self.text_encoder(net)
        if silent:
            log.info("%s", silent)
        if not can_score():
            log.warning("%s", MISSING)
        sets = self.sets()
        gallery, found = Gallery(self.shown, self.short_bytes), []
        began, written = time.monotonic(), 0
        with progress() as bar:
            task = bar.add_task("describe", total=self.clips * len(sets))
            for clips in sets:
                told = []
                for items in batches(clips, self.batch_size, self.pixels_per_batch):
                    told += self.describe(net, styles, items, contrast=text is not None)
                    gallery.offer(clips, told[-len(items) :], items)
                    bar.advance(task, len(items))
                if not told:
                    raise DataError(self.nothing(clips))
                written += sum(len(one.texts) for one in told)
                found.append((clips, told))
        seconds = time.monotonic() - began
        report = plain(
            {
                "captioner": self.captioner,
                "styles": styles,
                "captions_per_s": written / seconds,
                "contrast": silent or "yes",
                "text_scores": "yes" if can_score() else MISSING,
                "remarks": list(self.remarks()),
                "sets": [
                    {"name": clips.name, "title": clips.title, "left_out": dict(clips.left_out)}
                    | measure(told, styles, self.short_bytes, self.pool, net if text else None, text)
                    for clips, told in found
                ],
            }
        )
        with replacing(self.out / "report.json") as path:
            path.write_text(json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
        page = write_page(self.out / "captions.html", report, gallery)
        show(Console(highlight=False), report)
        return chief(report) | {"report": str(self.out / "report.json"), "page": str(page)}

    def sets(self) -> list[Clips]:
        """Return the sets of clips to describe."""
        found: list[Clips] = []
        if self.places:
            found.append(OfShards(self.places, self.buckets, self.clips, self.seed, self.remote))
        if world := world_of(self.world, self.world_seed, self.places):
            found += [OfWorld(world, split, self.clips) for split in SPLITS]
        return found

    def asked(self, net: nn.Module) -> list[str]:
        """Return the styles to ask for."""
        if not all(hasattr(net, name) for name in ("look", "say", "known_styles")):
            raise ConfigError(
                f"inputs.captioner={self.captioner}: holds a {type(net).__name__}; give a captioner's folder"
            )
        known: Sequence[str] = net.known_styles  # type: ignore[assignment]
        wanted = known if self.styles is None else self.styles
        if not known or not set(wanted) <= set(known):
            raise ConfigError(
                f"inputs.captioner={self.captioner} was trained on the styles {list(known)}, not on"
                f" {sorted(set(wanted) - set(known))}; train it on captions of these types, or set stage.job.styles"
            )
        return list(wanted)

    def text_encoder(self, net: nn.Module) -> tuple[nn.Module | None, str]:
        """Return what reads texts for the contrast; or none, and why."""
        if not all(hasattr(net, name) for name in ("embed_video", "embed_text")):
            return None, f"recall is left out: {type(net).__name__} has no contrastive head"
        try:
            return weights.load(self.captioner, "text", self.device)[0], ""
        except DataError as error:
            return None, f"recall is left out: no text encoder of a contrastive head is beside the captioner ({error})"

    @torch.inference_mode()
    def describe(self, net: Any, styles: Sequence[str], items: Sequence[Item], *, contrast: bool) -> list[Told]:
        """Return what the captioner says of clips of one shape, in each style that they are asked for."""
        styles = asked_of(styles, len(items[0].frames))
        pixels = to_pixels(torch.from_numpy(np.stack([item.frames for item in items])).to(self.device))
        fps = torch.tensor([item.fps for item in items], dtype=torch.float32, device=self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            looked = net.look(pixels, fps)[0]
            texts = {style: net.say(looked, style) for style in styles}
            vectors = net.embed_video(pixels, fps).float().cpu() if contrast else [None] * len(items)
        return [
            Told(item.name, item.captions, item.truth, {style: texts[style][place] for style in styles}, vectors[place])
            for place, item in enumerate(items)
        ]

    def nothing(self, clips: Clips) -> str:
        """Return why there is nothing to evaluate."""
        reasons = "; ".join(f"{count} × {reason}" for reason, count in clips.left_out.most_common())
        return (
            f"inputs.shards={clips.title}: no clip has a caption to be held against ({reasons or 'there is no clip'});"
            " give shards with captions, or evaluate on the world: inputs.shards=null stage.job.world=demo"
        )

    def remarks(self) -> list[str]:
        """Return what a reader of the figures must know."""
        trained = outputs.stored_upstream(Path(self.captioner)).get("shards", {}).get("path")
        resolved = {str(Path(place).resolve()) for place in self.places}
        if trained and str(Path(trained).resolve()) in resolved:
            return [f"the captioner was trained on {trained}: what it says of clips of these shards is no test of it"]
        return []


def chief(report: dict[str, Any]) -> dict[str, float]:
    """Return the figures by which runs are compared, those of `chief_of`, and how many clips there were in all.

    What no true caption of that style speaks of, such as colours in `camera`, has none.
    """
    last, style = chief_of(report)
    found = last["styles"][style]
    world, said = (found["world"] or {}).get("ours", {}), said_in(found["world"]) if found["world"] else set()
    figures = {name: world[name] for name in CHIEF if name in said and world.get(name) is not None}
    figures |= {name: value for name, value in (found["scores"] or {}).items() if value is not None}
    if pooled := last["recall"].get(style):
        figures |= {f"recall_{way}": pooled[way]["at_1"] for way in ("video_to_text", "text_to_video")}
    return figures | {"clips": sum(item["clips"] for item in report["sets"])}
