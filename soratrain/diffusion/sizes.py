"""Sizes and prompts that can be drawn, and those that cannot, with the nearest that can."""

from __future__ import annotations

from collections.abc import Sequence

from soratrain.errors import ConfigError
from soratrain.models.patchify import STRIDE

RATES = (0.1, 1000)  # frames a second that a file can say
PROMPT_BYTES = 10_000  # a prompt longer than this is a mistake, a file's content say


def check_size(height: int, width: int, frames: int, patch: Sequence[int], stride: Sequence[int] = STRIDE) -> None:
    """Refuse sizes that are no whole number of latent patches.

    Raises:
        ConfigError: names the nearest sizes that can be drawn.
    """
    if min(patch) < 1:
        raise ConfigError(f"dit.patch={list(patch)} must be three numbers of at least 1")
    for name, value, unit in (("width", width, stride[2] * patch[2]), ("height", height, stride[1] * patch[1])):
        if value < unit or value % unit:
            below = max(value // unit, 1) * unit
            raise ConfigError(
                f"size={width}x{height}: {name} {value} is no multiple of {unit}; the nearest are {below} and"
                f" {below + unit}"
            )
    unit, least = stride[0] * patch[0], 1 + stride[0] * (patch[0] - 1)  # latent frames fill whole patches
    if frames < least or (frames - least) % unit:
        below = least + max((frames - least) // unit, 0) * unit
        raise ConfigError(
            f"frames={frames} is not {least} + a multiple of {unit}; the nearest are {below} and {below + unit}"
        )


def check_fps(fps: float) -> None:
    """Refuse rates at which nothing plays.

    Raises:
        ConfigError: names those that do.
    """
    if not RATES[0] <= fps <= RATES[1]:
        raise ConfigError(f"fps={fps:g} must lie between {RATES[0]:g} and {RATES[1]:g} frames a second")


def check_prompt(prompt: str, guidance_scale: float) -> None:
    """Refuse prompts that say nothing, or far too much, or are no text.

    Raises:
        ConfigError: one line with the mend.
    """
    if not prompt.strip() and guidance_scale != 0:
        raise ConfigError(
            "prompt is empty: there is nothing to draw; say what to show, or set sampler.guidance_scale=0 to draw"
            " without a prompt"
        )
    size = len(prompt.encode("utf-8", "replace"))
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):  # what Python makes of bytes that are not UTF-8
        raise ConfigError(f"prompt={prompt[:60]!r}: holds bytes that are no UTF-8 text; give it in UTF-8")
    if size > PROMPT_BYTES:
        raise ConfigError(f"prompt has {size} bytes, more than {PROMPT_BYTES}; shorten it")
