"""Clips described by the captioner that stage=captioner has trained."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from soratrain.batch import to_pixels
from soratrain.captions.engine import Answer, Load, Member, Question, Seen, by_style, chunks
from soratrain.data.assignment import Bucket
from soratrain.data.decode import load_clip
from soratrain.errors import ConfigError
from soratrain.models import weights

PART = 1 << 24  # bytes of weights in memory while they are hashed


class NativeEngine:
    """The trained captioner: what is sure of itself first, and by chance when it is asked again.

    Args:
        captioner: folder of the captioner's weights.
        batch_size: clips described at once, at most.
        pixels_per_batch: pixels (frames x height x width) described at once, at most.
        top_p: nucleus of a second attempt.

    Raises:
        ConfigError: a value out of range.
    """

    name, model = "native", "captioner"
    load: Load = staticmethod(load_clip)
    prompted = False
    gone = ""

    def __init__(
        self, *, captioner: str, batch_size: int = 128, pixels_per_batch: int = 1 << 24, top_p: float = 0.9
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pixels_per_batch", pixels_per_batch)):
            if value < 1:
                raise ConfigError(f"engine.{name}={value} must be at least 1")
        if not 0 < top_p <= 1:
            raise ConfigError(f"engine.top_p={top_p} must lie in (0, 1]")
        self.folder, self.batch_size, self.pixels_per_batch, self.top_p = captioner, batch_size, pixels_per_batch, top_p

    def open(self, device: torch.device, autocast: bool, prompts: Mapping[str, str]) -> None:
        """Load the captioner."""
        self.device, self.autocast = device, autocast
        self.net: Any = weights.load(self.folder, "captioner", device)[0]

    def try_out(self) -> None:
        """Weights that could be loaded answer."""

    def identity(self) -> str:
        """Return a hash of the weights."""
        digest = hashlib.sha256()
        for path in weights.files(self.folder, "captioner"):
            with path.open("rb") as file:
                while part := file.read(PART):
                    digest.update(part)
        return digest.hexdigest()

    def styles(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the styles to write, of those that the captioner was trained on."""
        known = list(self.net.known_styles)
        if not known:
            raise ConfigError(f"inputs.captioner={self.folder} has learned no style; train it on clips with captions")
        styles = known if wanted is None else list(wanted)
        if lacking := [style for style in styles if style not in known]:
            raise ConfigError(
                f"inputs.captioner={self.folder} was trained on the styles {known}, not on {lacking}; train it on"
                " captions of these types, or set stage.job.styles"
            )
        return styles

    def groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Return clips of one size together, as many as are described at once."""
        sizes: dict[Bucket, list[Member]] = {}
        for member in members:
            sizes.setdefault(member[1], []).append(member)
        found = []
        for bucket, some in sizes.items():
            fitting = self.pixels_per_batch // (bucket.frames * bucket.height * bucket.width)
            found += chunks(some, max(1, min(self.batch_size, fitting)))
        return found

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Compute as was asked for, and say what to do where the memory does not hold it."""
        try:
            with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                yield
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"engine.batch_size={self.batch_size}, engine.pixels_per_batch={self.pixels_per_batch}: {self.device}"
                " has not the memory for as many clips at once; use smaller ones: the same command, with them, goes on"
            ) from error

    def look(self, clips: Sequence[Seen]) -> torch.Tensor:
        """Return what the decoder reads of clips of one size.

        Raises:
            ConfigError: the device's memory does not hold as many at once.
        """
        with self._computing():
            pixels = to_pixels(torch.from_numpy(np.stack([clip.video for clip in clips])).to(self.device))
            fps = torch.tensor([clip.fps for clip in clips], device=self.device)
            return self.net.look(pixels, fps)[0]

    def ask(self, looked: torch.Tensor, questions: Sequence[Question]) -> list[Answer]:
        """Return the captions: the likeliest, or by chance from the nucleus.

        Raises:
            ConfigError: as above.
        """
        found: dict[int, Answer] = {}
        with self._computing():
            for (style, again), places in by_style(questions).items():
                asked = [questions[place] for place in places]
                chance = {"top_p": self.top_p, "draws": [question.draw for question in asked]} if again else {}
                said = self.net.say(looked[[question.place for question in asked]], style, **chance)
                answers = (Answer(text, cut=not text) for text in said)  # what does not end comes back as nothing
                found |= dict(zip(places, answers, strict=True))
        return [found[place] for place in range(len(questions))]
