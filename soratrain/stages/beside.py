"""What a rank computes with beside the nets that it trains, and what that takes of its memory.

A DiT's are a frozen VAE and a frozen text encoder, where they run live; a captioner's are others' nets, kept frozen.

Counted before anything is loaded, by stage=plan and at a run's start alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from soratrain.data.datamodule import LatentData
from soratrain.distributed.memory import FP32
from soratrain.errors import DataError
from soratrain.models.autoencoders import outline
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_tower import Tower
from soratrain.models.patchify import STRIDE
from soratrain.models.published import Published
from soratrain.stages.plan_cost import stride_of

HALF = 2
VAE, TEXT = "the VAE's weights", "the text encoder's weights"


@dataclass
class Beside:
    """What is held beside the nets that are trained.

    Attributes:
        bytes: by name.
        unknown: what runs live and cannot be counted, in words.
    """

    bytes: dict[str, int] = field(default_factory=dict)
    unknown: list[str] = field(default_factory=list)

    @property
    def said(self) -> str:
        """What is not counted, to go at the end of a line."""
        return "".join(f"; {item}" for item in self.unknown)


def live_vae(place: str | Path, factory: partial | None, found: Beside) -> Sequence[int] | None:
    """Count a VAE, which computes in fp32; return its stride, or None where nothing is known of it.

    Args:
        place: its folder, or its id on the hub.
        factory: of the one that the config names; it counts where the folder is not there yet.
    """
    stride: Sequence[int]
    try:
        stride, numbers = outline(place)
    except DataError:
        if factory is None or issubclass(factory.func, Published):  # type: ignore[arg-type]
            found.unknown.append(f"the VAE runs live, and {place} is not here to be counted")
            return None if factory is None else stride_of(factory)
        with torch.device("meta"):
            numbers = sum(parameter.numel() for parameter in factory().parameters())
        stride = stride_of(factory)
    found.bytes[VAE] = FP32 * numbers
    return stride


def live_text(text: nn.Module | None, found: Beside) -> None:
    """Count a frozen text encoder that reads at every step."""
    if not isinstance(text, FrozenText):
        return
    files = sorted((Path(text.folder) / (text.options["subfolder"] or "")).glob("*.safetensors"))
    try:
        numbers = sum(map(stored, files))
    except SafetensorError:
        numbers = 0
    if numbers:
        found.bytes[TEXT] = (HALF if text.options["dtype"] == "bf16" else FP32) * numbers
    else:
        found.unknown.append(f"the text encoder runs live, and {text.folder} is not here to be counted")


def frozen_nets(nets: Iterable[nn.Module], found: Beside) -> None:
    """Count others' nets that a captioner takes as they are, alone or under adapters: whole on every rank.

    Numbers times bytes of one, and no more: what is not trained has no gradients and no moments (Hu et al., "LoRA",
    2022, section 4.2), and autocast keeps no copies of weights that need no gradient.
    """
    for tower in (part for net in nets for part in net.modules() if isinstance(part, Tower)):
        if count := tower.frozen_bytes():
            found.bytes[f"the frozen {tower.called}'s weights"] = count


def latents_stride(live: str | None, trainer: Any) -> Sequence[int]:
    """Return the stride of the latents that a DiT trains on; the usual one where nothing tells.

    Args:
        live: place of the VAE that makes them as training goes; None where they are stored.
        trainer: of a run, with its data.
    """
    data = getattr(trainer, "datamodule", None)
    known = data.stride() if isinstance(data, LatentData) else None
    return (live_vae(live, None, Beside()) if live else known) or STRIDE


def running(live: str | None, text: nn.Module | None, trainer: Any) -> tuple[dict[str, int], str]:
    """Return what a DiT's training computes with beside its nets, and what is not counted; see `latents_stride`."""
    found, data = Beside(), getattr(trainer, "datamodule", None)
    if live:
        live_vae(live, None, found)
    held = data.stored_texts() if isinstance(data, LatentData) else {}
    if isinstance(text, FrozenText) and text.lacking(held):
        live_text(text, found)
    return found.bytes, found.said


def stored(file: Path) -> int:
    """Return how many numbers a file of safetensors holds."""
    with safe_open(str(file), framework="pt") as opened:
        return sum(math.prod(opened.get_slice(key).get_shape()) for key in opened.keys())  # noqa: SIM118
