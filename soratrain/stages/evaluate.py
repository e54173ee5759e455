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

from data_prep.world import Prompt, Scene, Seen, World, agreement, cut_off, measure, read_caption, render
from soratrain.batch import to_pixels
from soratrain.data.atomic import replacing
from soratrain.diffusion.generator import Generator
from soratrain.diffusion.sampler import Sampler
from soratrain.errors import ConfigError
from soratrain.media import write_video
from soratrain.models import weights
from soratrain.models.caption_model import CaptionModel
from soratrain.sheet import Row, contact_sheet

log = logging.getLogger(__name__)

ATTRIBUTES = ("color", "shape", "motion", "background", "number")
NOTED = ("color", "shape", "motion", "background")
SPLITS = ("seen", "heldout")


def mean_agreement(seen: Sequence[Seen], truth: Sequence[Seen]) -> dict[str, float]:
    """Return, for each attribute, the mean over the clips whose truth has it of how far the reading agrees with it."""
    scores = [agreement(a, b) for a, b in zip(seen, truth, strict=True)]
    found = {name: [score[name] for score in scores if name in score] for name in ATTRIBUTES}
    return {name: float(np.mean(values)) for name, values in found.items() if values}


def value(seen: Seen, name: str) -> str | None:
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
        sampler: how samples are drawn.
        precision: `bf16-mixed` runs the nets under autocast, `32-true` does not.
        device: `auto`, `cpu` or `cuda`.
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
        sampler: Sampler,
        precision: str = "32-true",
        device: str = "auto",
    ) -> None:
        self.out = Path(out)
        self.vae, self.captioner, self.dit = vae, captioner, dit
        self.world = World(preset=preset, seed=world_seed)
        self.prompts, self.clips = prompts, clips
        self.seed, self.sampler, self.precision = seed, sampler, precision
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    def __call__(self) -> dict[str, Any]:
        """Return and store every figure: the share of clips that is right, by part, split and attribute."""
        generate = Generator.load(self.vae, self.dit, device=self.device, precision=self.precision)
        captioner = weights.load(self.captioner, "captioner", self.device)[0]
        if not isinstance(captioner, CaptionModel):
            raise ConfigError(
                f"inputs.captioner={self.captioner}: holds a {type(captioner).__name__}; give a captioner's folder"
            )
        captioner.style_ids(["short"])
        report: dict[str, Any] = {"chance": self.world.chance()}
        for split in SPLITS:
            scenes = [self.world.scene(index, split) for index in range(self.clips)]
            truth = [scene.truth for scene in scenes]
            frames = [render(scene) for scene in scenes]
            ceiling = mean_agreement(self.see(frames), truth)
            report.setdefault("ceiling", {})[split] = {**ceiling, "cut_off": self.cut_off(frames)}
            report.setdefault("reconstruction", {})[split] = self.reconstruct(generate, frames, truth)
            with generate.autocast():
                report.setdefault("captioner", {})[split] = self.caption(captioner, frames, scenes)
        sections = []
        for split in SPLITS:
            prompts = self.world.prompts(self.prompts, split)
            clips = self.sample(generate, prompts)
            seen = self.see(clips)
            agreed = mean_agreement(seen, [prompt.truth for prompt in prompts])
            report.setdefault("samples", {})[split] = {**agreed, "cut_off": self.cut_off(clips)}
            rows = [self.row(split, *triple) for triple in list(zip(prompts, clips, seen, strict=True))[:8]]
            sections.append((HEADINGS[split], rows))
        sheet = self.out / "contact_sheet.png"
        contact_sheet(sheet, "soratrain: samples and what the oracle sees in them", sections)
        document = json.dumps(report, indent=1)
        with replacing(self.out / "report.json") as path:
            path.write_text(document)
        samples = report["samples"]
        flat = {f"{name}_{split}": samples[split][name] for split in SPLITS for name in samples[split]}
        return {**flat, "report": report, "contact_sheet": str(sheet)}

    def see(self, clips: Sequence[np.ndarray]) -> list[Seen]:
        """Return the oracle's reading of each clip."""
        return [measure(clip, preset=self.world.preset) for clip in clips]

    def cut_off(self, clips: Sequence[np.ndarray]) -> float:
        """Return the share of clips in which the frame's edge cuts an object, which no true clip has."""
        return float(np.mean([cut_off(clip, preset=self.world.preset) for clip in clips]))

    def reconstruct(self, generate: Generator, frames: Sequence[np.ndarray], truth: Sequence[Seen]) -> dict[str, float]:
        """Return what the oracle reads from the autoencoder's reconstructions, and their PSNR in dB."""
        decoded = [generate.decode(generate.encoded(clip)) for clip in frames]
        quality = float(np.mean([psnr(a, b) for a, b in zip(frames, decoded, strict=True)]))
        return {**mean_agreement(self.see(decoded), truth), "psnr": quality, "cut_off": self.cut_off(decoded)}

    @torch.inference_mode()
    def caption(
        self, captioner: CaptionModel, frames: Sequence[np.ndarray], scenes: Sequence[Scene]
    ) -> dict[str, float]:
        """Return how far the captioner's short captions agree with the truth."""
        texts = [""] * len(frames)
        for same in by_shape(frames):
            pixels = to_pixels(torch.from_numpy(np.stack([frames[index] for index in same])).to(self.device))
            fps = torch.tensor([scenes[index].fps for index in same], dtype=torch.float32, device=self.device)
            for index, text in zip(same, captioner.generate(pixels, fps, "short"), strict=True):
                texts[index] = text
        return mean_agreement([read_caption(text) for text in texts], [scene.truth for scene in scenes])

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
                sampler=self.sampler,
            )
            for index, clip in zip(same, drawn, strict=True):
                clips[index] = clip
        return clips

    def row(self, split: str, prompt: Prompt, clip: np.ndarray, seen: Seen) -> Row:
        """Write one clip as MP4 and return its row of the contact sheet."""
        name = "".join(letter if letter.isalnum() else "_" for letter in prompt.text)[:60].strip("_")
        write_video(self.out / "samples" / f"{split}-{name}.mp4", clip, prompt.fps)
        notes = [
            (str(value(seen, key) or "nothing"), value(seen, key) == value(prompt.truth, key))
            for key in NOTED
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
