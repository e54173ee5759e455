"""Text to clips with trained nets: what `stage=sample` and `stage=evaluate` share."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soratrain.batch import draw_of, keyed_normal, to_uint8
from soratrain.diffusion.flow import Flow, Objective
from soratrain.diffusion.sampler import euler, guided
from soratrain.diffusion.segments import Segment, flatten
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.autoencoders import load_vae
from soratrain.models.dit import DiT
from soratrain.models.patchify import STRIDE
from soratrain.models.text import ByteTextEncoder
from soratrain.models.vae import VAE

log = logging.getLogger(__name__)

DECODED = 1 << 22  # pixels decoded at once: what a VAE keeps of a clip in between is many times as large
PROMPT_BYTES = 10_000  # a prompt longer than this is a mistake, a file's content say


class Generator:
    """Text to clips with trained nets.

    Args:
        vae, dit, text: the nets, in eval mode, on one device.
        objective: the one that the DiT was trained for.
        batch: most clips drawn at once.
    """

    def __init__(
        self, vae: VAE, dit: DiT, text: ByteTextEncoder, *, objective: Objective | None = None, batch: int = 16
    ) -> None:
        self.vae, self.dit, self.text, self.batch = vae, dit, text, batch
        self.objective: Objective = Flow() if objective is None else objective

    @classmethod
    def load(
        cls, vae: str | Path, dit: str | Path, *, device: torch.device | str = "cpu", batch: int = 16
    ) -> Generator:
        """Return a generator from the folders of a trained VAE and a trained DiT.

        Raises:
            DataError: weights are missing, do not fit each other, or are of an objective that this cannot sample.
        """
        dit_net, extra = weights.load(dit, "dit", device)
        text_net, _ = weights.load(dit, "text", device)
        vae_net = load_vae(vae, device)
        objective = dict(extra.get("objective", {"name": "flow"}))
        if objective.pop("name") != "flow":
            raise DataError(
                f"the weights in {dit} are of the objective {extra['objective']['name']!r}; this samples flow"
            )
        assert isinstance(dit_net, DiT) and isinstance(text_net, ByteTextEncoder)
        if dit_net.channels != vae_net.latent_channels:
            raise DataError(
                f"the DiT in {dit} draws {dit_net.channels} latent channels, the VAE in {vae} has"
                f" {vae_net.latent_channels}; use the VAE that its latents were encoded with"
            )
        if vae_net.stride[0] != STRIDE[0]:
            raise DataError(f"the VAE in {vae} has a stride of {vae_net.stride[0]} in time; the DiT counts {STRIDE[0]}")
        return cls(vae_net, dit_net, text_net, objective=Flow(**objective), batch=batch)

    def check(self, prompts: Sequence[str], height: int, width: int, frames: int, guidance_scale: float) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ConfigError: one line that names the key, the value and the mend.
        """
        check_size(height, width, frames, self.dit.patch, self.vae.stride)
        for prompt in prompts:
            check_prompt(prompt, guidance_scale)

    @torch.inference_mode()
    def __call__(
        self,
        prompts: Sequence[str],
        *,
        height: int,
        width: int,
        frames: int,
        fps: float = 8.0,
        seed: int = 0,
        steps: int = 25,
        guidance_scale: float = 3.0,
    ) -> list[np.ndarray]:
        """Return a clip for each prompt, uint8 `[T, H, W, 3]`.

        A clip's noise depends on (seed, prompt) alone, so its content does not depend on the others in its batch.

        Raises:
            ConfigError: a prompt, size or length that cannot be drawn.
        """
        self.check(prompts, height, width, frames, guidance_scale)
        tokens = self.text.tokenize(prompts)
        if tokens.truncated:
            log.warning(
                "%d of %d prompts are longer than %d tokens; what follows is not read",
                tokens.truncated,
                len(prompts),
                self.text.max_tokens,
            )
        time, high, wide = self.vae.stride
        shape = (self.dit.channels, 1 + (frames - 1) // time, height // high, width // wide)
        clips: list[np.ndarray] = []
        for start in range(0, len(prompts), self.batch):
            some = prompts[start : start + self.batch]
            noise = torch.stack([keyed_normal(draw_of(seed, prompt), "noise", shape) for prompt in some])
            latents = self.draw(some, noise, fps, steps, guidance_scale)
            clips += [self.decode(latent) for latent in latents]
        return clips

    def decode(self, latent: Tensor) -> np.ndarray:
        """Return the clip, uint8 `[T, H, W, 3]`, of a latent `[C, t, h, w]`, made piece by piece."""
        pieces = self.vae.decode_stream([latent[None]], latent.shape[1], DECODED)
        return np.concatenate([to_uint8(piece)[0].cpu().numpy() for piece in pieces])

    def draw(self, prompts: Sequence[str], noise: Tensor, fps: float, steps: int, guidance_scale: float) -> Tensor:
        """Return latents `[B, C, t, h, w]` for the prompts, from noise of that shape."""
        device = self.dit.head.weight.device
        guide = guidance_scale != 1
        text, packing = self.text(self.text.tokenize([*prompts, *[""] * (len(prompts) if guide else 0)]))
        tokens = noise[0, 0].numel() // self.dit.patch_size

        def velocity(x: Tensor, sigma: float) -> Tensor:
            level = torch.tensor(sigma)
            both = torch.cat((x, x)) if guide else x
            flat = flatten([[Segment(latent, level, fps)] for latent in both], self.dit.patch, self.dit.rope_time)
            out = flat.unflatten(self.dit(flat.tokens, text, packing).float())
            speed = self.objective.to_velocity(both, torch.stack([segments[0] for segments in out]), level)
            return guided(speed[: len(x)], speed[len(x) :], guidance_scale) if guide else speed

        return euler(velocity, noise.to(device), self.objective.grid(steps, tokens))


def check_size(height: int, width: int, frames: int, patch: Sequence[int], stride: Sequence[int] = STRIDE) -> None:
    """Refuse sizes that are no whole number of latent patches.

    Raises:
        ConfigError: names the nearest sizes that can be drawn.
    """
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


def check_prompt(prompt: str, guidance_scale: float) -> None:
    """Refuse prompts that say nothing, or far too much.

    Raises:
        ConfigError: one line with the mend.
    """
    if not prompt.strip() and guidance_scale != 0:
        raise ConfigError(
            "prompt is empty: there is nothing to draw; say what to show, or set sampler.guidance_scale=0 to draw"
            " without a prompt"
        )
    size = len(prompt.encode("utf-8", "replace"))
    if size > PROMPT_BYTES:
        raise ConfigError(f"prompt has {size} bytes, more than {PROMPT_BYTES}; shorten it")
