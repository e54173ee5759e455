"""A sample's files: the clip (MP4, or PNG where it is one frame), a strip of its frames, and how to make it again."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from soratrain.data.atomic import replacing
from soratrain.errors import UserError
from soratrain.media import write_image, write_video

log = logging.getLogger(__name__)

STRIP = 8  # frames of the still picture that goes with a video


def slug(prompt: str) -> str:
    """Return a file name for a prompt in any script: its first words, and a hash that tells prompts apart."""
    plain = unicodedata.normalize("NFC", prompt.encode("utf-8", "ignore").decode()).lower()
    words = re.sub(r"[\W_]+", "-", plain).strip("-").encode()[:48].decode("utf-8", "ignore").strip("-")
    digest = hashlib.blake2b(prompt.encode("utf-8", "replace"), digest_size=4).hexdigest()
    return f"{words or 'prompt'}-{digest}"


def identity(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what decides a sample: not where its inputs lay, who made its prompt longer, nor what versions drew it."""
    inputs = {key: value["blake2b"] for key, value in document.get("inputs", {}).items()}
    decides = {key: value for key, value in document.items() if key not in ("expanded_by", "versions")}
    return {**decides, "inputs": inputs}


def name_of(document: Mapping[str, Any]) -> str:
    """Return the name of a sample's files: a name for each prompt, model and setting."""
    settings = {key: value for key, value in identity(document).items() if key != "prompt"}
    digest = hashlib.blake2b(json.dumps(settings, sort_keys=True).encode(), digest_size=4).hexdigest()
    return f"{slug(document['prompt'])}-{digest}"


def is_there(notes: Path, document: Mapping[str, Any]) -> bool:
    """Return whether a sample is drawn: its notes say the same, and the clip lies beside them."""
    if not notes.is_file() or not clip_of(notes, document).is_file():
        return False
    found = json.loads(notes.read_text(encoding="utf-8"))
    return identity(found) == identity(json.loads(json.dumps(document)))


def clip_of(notes: Path, document: Mapping[str, Any]) -> Path:
    """Return the file of the clip whose notes lie at `notes`."""
    return notes.with_suffix(".png" if document["frames"] == 1 else ".mp4")


def write_sample(notes: Path, frames: Iterable[np.ndarray], document: Mapping[str, Any]) -> None:
    """Write a sample's files as its frames, uint8 `[H, W, 3]`, come, each whole or not at all; its notes at the end."""
    count = document["frames"]
    chosen = set(np.linspace(0, count - 1, min(STRIP, count)).round().astype(int).tolist())
    strip: list[np.ndarray] = []

    def watched() -> Iterator[np.ndarray]:
        for number, frame in enumerate(frames):
            if number in chosen:
                strip.append(frame)
            yield frame

    if count > 1:
        write_video(notes.with_suffix(".mp4"), watched(), document["fps"])
    else:
        strip += [frame for frame in frames]
    write_image(notes.with_suffix(".png"), np.concatenate(strip, axis=1))
    with replacing(notes) as temporary:
        temporary.write_text(json.dumps(document, ensure_ascii=False, indent=1), encoding="utf-8")


class Writer:
    """Writes samples on the first rank of a group; the others only make the frames, which all draw together.

    Args:
        writes: whether this rank does.
        goes_on: whether others draw along, so that a failure waits in `failure` until all can stop.
    """

    def __init__(self, *, writes: bool, goes_on: bool) -> None:
        self.writes, self.goes_on = writes, goes_on
        self.failure: UserError | OSError | None = None

    def __call__(self, notes: Path, frames: Iterable[np.ndarray], document: Mapping[str, Any]) -> None:
        """Write a sample, or have its frames made."""
        frames = iter(frames)
        if self.writes and self.failure is None:
            try:
                write_sample(notes, frames, document)
            except (UserError, OSError) as error:
                if not self.goes_on:
                    raise
                self.failure = error
            else:
                log.info("%s: %s", clip_of(notes, document), document["prompt"][:80])
        for _ in frames:
            pass
