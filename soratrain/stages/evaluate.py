"""Measure the chain on the embedded world, whose truth is known: reconstructions, captions, samples.

The oracle reads what is to be seen in frames; its reading of true renderings is the ceiling, guessing is the floor.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_prep.world import Prompt, World, measure, read_caption, render
from soratrain.batch import to_pixels, to_uint8
from soratrain.media import write_video
from soratrain.models import weights
from soratrain.models.weights import write_atomically
from soratrain.sheet import Row, contact_sheet
from soratrain.stages.sample import Generator

log = logging.getLogger(__name__)

ATTRIBUTES = ("color", "shape", "motion", "background")
SPLITS = ("seen", "heldout")


def agreement(seen: Sequence[Any], truth: Sequence[Any]) -> dict[str, float]:
    """Return, for each attribute that the truth has, the share of clips in which the reading equals it."""
    scores = {}
    for name in ATTRIBUTES:
        pairs = [(value(a, name), value(b, name)) for a, b in zip(seen, truth, strict=True)]
        judged = [got == want for got, want in pairs if want is not None]
        if judged:
            scores[name] = sum(judged) / len(judged)
    return scores


def value(seen: Any, name: str) -> Any:
    """Return an attribute of what was seen: the background, or a property of the first object (None where none is)."""
    if name == "background":
        return seen.background
    return getattr(seen.objects[0], name) if seen.objects else None


def psnr(clip: np.ndarray, other: np.ndarray) -> float:
    """Return the peak signal-to-noise ratio of two uint8 clips, in dB."""
    error = np.mean((clip.astype(np.float32) - other.astype(np.float32)) ** 2)
    return float(10 * np.log10(255.0**2 / max(float(error), 1e-10)))


class Evaluate:
    """The job of `stage=evaluate`.

    Args:
        out: the stage's folder; gets `report.json`, `contact_sheet.png` and `samples/*.mp4`.
        vae, captioner, dit: folders with the weights.
        prompts: prompts of each split, drawn from scenes that no training clip shows.
        clips: clips of each split for reconstructions and captions.
    """

    def __init__(
        self,
        *,
        out: str,
        vae: str,
        captioner: str,
        dit: str,
        preset: str,
        world_seed: int,
        prompts: int,
        clips: int,
        seed: int,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.out = Path(out)
        self.folders = {"vae": vae, "captioner": captioner, "dit": dit, "text": dit}
        self.world = World(preset=preset, seed=world_seed)
        self.prompts, self.clips = prompts, clips
        self.seed, self.steps, self.guidance_scale = seed, steps, guidance_scale

    def __call__(self) -> dict[str, Any]:
        """Return and store every figure: the share of clips that is right, by part, split and attribute."""
        nets = {name: weights.load(folder, name)[0] for name, folder in self.folders.items()}
        report: dict[str, Any] = {"chance": self.world.chance()}
        for split in SPLITS:
            scenes = [self.world.scene(index, split) for index in range(self.clips)]
            truth = [scene.truth for scene in scenes]
            frames = [render(scene) for scene in scenes]
            report.setdefault("ceiling", {})[split] = agreement([measure(clip) for clip in frames], truth)
            report.setdefault("reconstruction", {})[split] = self.reconstruct(nets["vae"], frames, truth)
            report.setdefault("captioner", {})[split] = self.caption(nets["captioner"], frames, truth)
        generate = Generator(vae=nets["vae"], dit=nets["dit"], text=nets["text"])
        sections = []
        for split in SPLITS:
            prompts = self.world.prompts(self.prompts, split)
            clips = self.sample(generate, prompts)
            seen = [measure(clip) for clip in clips]
            report.setdefault("samples", {})[split] = agreement(seen, [prompt.truth for prompt in prompts])
            rows = [self.row(split, *triple) for triple in list(zip(prompts, clips, seen, strict=True))[:8]]
            sections.append((HEADINGS[split], rows))
        sheet = self.out / "contact_sheet.png"
        contact_sheet(sheet, "soratrain: samples and what the oracle sees in them", sections)
        document = json.dumps(report, indent=1)
        write_atomically(self.out / "report.json", lambda path: path.write_text(document))
        samples = report["samples"]
        flat = {f"{name}_{split}": samples[split][name] for split in SPLITS for name in samples[split]}
        return {**flat, "report": report, "contact_sheet": str(sheet)}

    @torch.inference_mode()
    def reconstruct(self, vae: nn.Module, frames: Sequence[np.ndarray], truth: Sequence[Any]) -> dict[str, float]:
        """Return what the oracle reads from the autoencoder's reconstructions, and their PSNR in dB."""
        decoded = []
        for clip in frames:
            pixels = to_pixels(torch.from_numpy(clip)[None])
            decoded.append(to_uint8(vae.decode(vae.encode(pixels)))[0].numpy())
        quality = float(np.mean([psnr(a, b) for a, b in zip(frames, decoded, strict=True)]))
        return {**agreement([measure(clip) for clip in decoded], truth), "psnr": quality}

    @torch.inference_mode()
    def caption(self, captioner: nn.Module, frames: Sequence[np.ndarray], truth: Sequence[Any]) -> dict[str, float]:
        """Return how far the captioner's short captions agree with the truth."""
        texts = [""] * len(frames)
        for same in by_shape(frames):
            pixels = to_pixels(torch.from_numpy(np.stack([frames[index] for index in same])))
            fps = torch.full((len(same),), 8.0)
            for index, text in zip(same, captioner.generate(pixels, fps=fps, style="short"), strict=True):
                texts[index] = text
        return agreement([read_caption(text) for text in texts], truth)

    def sample(self, generate: Generator, prompts: Sequence[Prompt]) -> list[np.ndarray]:
        """Return a clip for every prompt, prompts of one size and length together."""
        clips: list[np.ndarray] = [np.zeros(0)] * len(prompts)
        sizes = sorted({(prompt.height, prompt.width, prompt.frames) for prompt in prompts})
        for height, width, frames in sizes:
            same = [i for i, p in enumerate(prompts) if (p.height, p.width, p.frames) == (height, width, frames)]
            drawn = generate(
                [prompts[index].text for index in same],
                height=height,
                width=width,
                frames=frames,
                fps=prompts[same[0]].fps,
                seed=self.seed,
                steps=self.steps,
                guidance_scale=self.guidance_scale,
            )
            for index, clip in zip(same, drawn, strict=True):
                clips[index] = clip
        return clips

    def row(self, split: str, prompt: Prompt, clip: np.ndarray, seen: Any) -> Row:
        """Write one clip as MP4 and return its row of the contact sheet."""
        name = "".join(letter if letter.isalnum() else "_" for letter in prompt.text)[:60].strip("_")
        write_video(self.out / "samples" / f"{split}-{name}.mp4", clip, prompt.fps)
        notes = [
            (str(value(seen, key) or "nothing"), value(seen, key) == value(prompt.truth, key))
            for key in ATTRIBUTES
            if value(prompt.truth, key) is not None
        ]
        return Row(prompt.text, clip, notes)


HEADINGS = {
    "seen": "Combinations that occur in training, new scenes",
    "heldout": "Combinations that never occur in training",
}


def by_shape(frames: Sequence[np.ndarray]) -> list[list[int]]:
    """Return the positions of clips of equal shape together."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, clip in enumerate(frames):
        groups.setdefault(clip.shape, []).append(index)
    return list(groups.values())
