"""The job that draws clips from prompts and writes them as MP4, PNG and JSON."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import time
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from soratrain.data.atomic import replacing
from soratrain.diffusion.generator import Generator, check_prompt, check_size
from soratrain.diffusion.sampler import Sampler
from soratrain.errors import ConfigError
from soratrain.media import write_image, write_video
from soratrain.models import weights

__all__ = ["Generator", "Sample"]

log = logging.getLogger(__name__)

STRIP = 8  # frames of the still picture that goes with a video


def parse_size(size: str) -> tuple[int, int]:
    """Return (height, width) of `WIDTHxHEIGHT`.

    Raises:
        ConfigError: it is written otherwise.
    """
    match = re.fullmatch(r"\s*(\d+)\s*[xX×]\s*(\d+)\s*", str(size))
    if not match:
        raise ConfigError(f"size={size!r} is not WIDTHxHEIGHT; write 832x480, say")
    return int(match[2]), int(match[1])


def slug(prompt: str) -> str:
    """Return a file name for a prompt in any script: its first words, and a hash that tells prompts apart."""
    plain = unicodedata.normalize("NFC", prompt.encode("utf-8", "ignore").decode()).lower()
    words = re.sub(r"[\W_]+", "-", plain).strip("-").encode()[:48].decode("utf-8", "ignore").strip("-")
    digest = hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=4).hexdigest()
    return f"{words or 'prompt'}-{digest}"


class Sample:
    """The job of `stage=sample`.

    Args:
        out: the stage's folder; clips go to `samples/`.
        vae, dit: folders with the weights.
        prompt: what to draw: one text, or several.
        size: `WIDTHxHEIGHT` in pixels.
        frames: 1 for an image, else 1 + 4k.
        fps: frames per second of the clip.
        seed: with the prompt, settles the noise.
        sampler: how they are drawn.
        patch: latent positions of a token, so that a wrong size is refused before the weights are read.
        batch: most clips drawn at once.
    """

    def __init__(
        self,
        *,
        out: str,
        vae: str,
        dit: str,
        prompt: str | Sequence[str] | None,
        size: str,
        frames: int,
        fps: float,
        seed: int,
        sampler: Sampler,
        patch: Sequence[int] = (1, 2, 2),
        batch: int = 16,
    ) -> None:
        if prompt is None or prompt == []:
            raise ConfigError('prompt is not set: say what to draw, for instance prompt="a red circle moves left"')
        self.prompts = [prompt] if isinstance(prompt, str) else [str(item) for item in prompt]
        self.height, self.width = parse_size(size)
        check_size(self.height, self.width, frames, patch)
        for text in self.prompts:
            check_prompt(text, sampler.guidance_scale)
        if fps <= 0:
            raise ConfigError(f"fps={fps} must be above 0")
        self.out, self.vae, self.dit, self.batch, self.sampler = Path(out), vae, dit, batch, sampler
        self.settings: dict[str, Any] = {
            "size": f"{self.width}x{self.height}",
            "frames": frames,
            "fps": fps,
            "seed": seed,
        }

    def __call__(self) -> dict[str, Any]:
        """Draw every prompt that is not drawn yet with these settings; return how many, and where the clips are."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        generate = Generator.load(self.vae, self.dit, device=device, batch=self.batch)
        generate.check(self.prompts, self.height, self.width, self.settings["frames"], self.sampler)
        self.settings["sampler"] = asdict(self.sampler.fitted(generate.objective))
        print_of = {name: weights.digest(getattr(generate, name))[:16] for name in ("vae", "dit")}
        documents = {
            self.path(prompt, print_of): {"prompt": prompt, **self.settings, "weights": print_of}
            for prompt in self.prompts
        }
        missing = {
            path: document
            for path, document in documents.items()
            if read_json(path) != document or not self.clip(path).is_file()
        }
        began = time.monotonic()
        texts = [document["prompt"] for document in missing.values()]
        settings = {key: self.settings[key] for key in ("frames", "fps", "seed")}
        size = {"height": self.height, "width": self.width}
        clips = generate(texts, **size, **settings, sampler=self.sampler) if texts else []
        for (path, document), clip in zip(missing.items(), clips, strict=True):
            write_clip(path, clip, self.settings["fps"], document)
            log.info("%s: %s", self.clip(path), document["prompt"][:80])
        return {
            "samples": len(documents),
            "drawn": len(missing),
            "seconds": round(time.monotonic() - began, 1),
            "files": [str(self.clip(path)) for path in documents],
        }

    def path(self, prompt: str, print_of: Mapping[str, str]) -> Path:
        """Return where the notes on a prompt's clip lie: a place for each model and setting."""
        identity = json.dumps([self.settings, dict(print_of)], sort_keys=True)
        settings = hashlib.blake2b(identity.encode(), digest_size=3).hexdigest()
        return self.out / "samples" / f"{slug(prompt)}-{settings}.json"

    def clip(self, path: Path) -> Path:
        """Return the file of the clip whose notes lie at `path`."""
        return path.with_suffix(".png" if self.settings["frames"] == 1 else ".mp4")


def write_clip(path: Path, clip: np.ndarray, fps: float, document: dict[str, Any]) -> None:
    """Write the clip beside `path` (a video also as a strip), then the JSON that says how to repeat it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if len(clip) > 1:
        write_video(path.with_suffix(".mp4"), clip, fps)
    chosen = np.unique(np.linspace(0, len(clip) - 1, min(STRIP, len(clip))).round().astype(int))
    write_image(path.with_suffix(".png"), np.concatenate(list(clip[chosen]), axis=1))
    text = json.dumps(document, ensure_ascii=False, indent=1)
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Return the document at `path`, or None where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
