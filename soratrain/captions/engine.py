"""What is asked of whoever describes clips: the captioner that was trained here, another's model, or a server.

An engine is made from values alone, so that what is wrong with them is known before anything is touched; `open` loads
nets or meets the server. Clips then come in groups: `look` prepares one, `ask` answers questions about its clips.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from soratrain.data.assignment import Bucket

Member = tuple[int, Bucket]  # a clip's number in the manifest, and the size at which it is encoded


@dataclass(frozen=True)
class Seen:
    """A clip as an engine sees it.

    Attributes:
        key: of the clip.
        video: frames that the engine's `load` took, uint8 `[T, H, W, 3]`.
        fps: frames a second of the part that is encoded.
        frames: of that part, at that rate.
    """

    key: str
    video: np.ndarray
    fps: float
    frames: int

    @property
    def seconds(self) -> float:
        """How long the part lasts; 0 for an image."""
        return 0.0 if self.frames == 1 else (self.frames - 1) / self.fps


class Question(NamedTuple):
    """What is asked about a clip of a group: its place there, the style, and the chance of a second attempt."""

    place: int
    style: str
    draw: int | None


class Answer(NamedTuple):
    """What came back.

    Attributes:
        text: of a caption, as it was said.
        cut: whether it broke off before its end.
        declined: whether it was marked as a refusal.
        failure: why there is no text.
        final: whether asking again, now or later, would fail in the same way.
    """

    text: str
    cut: bool = False
    declined: bool = False
    failure: str = ""
    final: bool = False


class Load(Protocol):
    """Takes an engine's frames out of a media member; it travels to the processes that decode."""

    def __call__(self, data: bytes, *, fps: Any, frames: int, bucket: Bucket, stride: int) -> np.ndarray:
        """Return frames, uint8 `[T, H, W, 3]`. Raises DataError where they cannot be decoded."""
        ...


class Engine(Protocol):
    """Describes clips.

    Attributes:
        name: the option of the config.
        model: the name that captions carry.
        load: how it takes frames.
        prompted: whether it is asked in words, a prompt for each style.
        gone: why nobody answers any more; empty while somebody does.
    """

    name: str
    model: str
    load: Load
    prompted: bool
    gone: str

    def open(self, device: torch.device, autocast: bool, prompts: Mapping[str, str]) -> None:
        """Load nets, or keep the texts that ask.

        Args:
            device: where nets compute.
            autocast: whether they do so in bf16.
            prompts: by style, what is asked; a captioner that was trained here needs none.

        Raises:
            UserError: it cannot be had.
        """
        ...

    def try_out(self) -> None:
        """See that an answer can come at all; one process does it for all.

        Raises:
            UserError: why none can.
        """
        ...

    def identity(self) -> str:
        """Return a hash, in hex digits, of what its captions depend on; the revision is the beginning of it."""
        ...

    def styles(self, wanted: Sequence[str] | None) -> list[str]:
        """Return the styles to write; None wants all.

        Raises:
            ConfigError: it does not know one of them.
        """
        ...

    def groups(self, members: Sequence[Member]) -> list[list[Member]]:
        """Cut up the clips of a shard into those that are described together."""
        ...

    def look(self, clips: Sequence[Seen]) -> Any:
        """Return what `ask` needs of a group's clips."""
        ...

    def ask(self, looked: Any, questions: Sequence[Question]) -> list[Answer]:
        """Return one answer to each question, in their order."""
        ...


def by_style(questions: Sequence[Question]) -> dict[tuple[str, bool], list[int]]:
    """Return the places of questions that can be asked in one call: of one style, by chance or not."""
    found: dict[tuple[str, bool], list[int]] = {}
    for place, question in enumerate(questions):
        found.setdefault((question.style, question.draw is not None), []).append(place)
    return found


def chunks(items: Sequence[Any], size: int) -> list[Any]:
    """Return `items` in pieces of at most `size`."""
    return [items[start : start + size] for start in range(0, len(items), size)]
