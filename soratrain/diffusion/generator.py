"""Text to clips with trained nets: what `stage=sample` and `stage=evaluate` share."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from soratrain.batch import draw_of, keyed_normal, to_uint8
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective, rebuilt
from soratrain.diffusion.sampler import Sampler
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
        caption_dropout: share of captions that it was trained without; None where that is not known.
        batch: most clips drawn at once.
    """

    def __init__(
        self,
        vae: VAE,
        dit: DiT,
        text: ByteTextEncoder,
        *,
        objective: Objective | None = None,
        caption_dropout: float | None = None,
        batch: int = 16,
    ) -> None:
        self.vae, self.dit, self.text, self.batch = vae, dit, text, batch
        self.objective: Objective = Flow() if objective is None else objective
        self.caption_dropout = caption_dropout

    @classmethod
    def load(
        cls, vae: str | Path, dit: str | Path, *, device: torch.device | str = "cpu", batch: int = 16
    ) -> Generator:
        """Return a generator from the folders of a trained VAE and a trained DiT.

        Raises:
            DataError: weights are missing, do not fit each other, or are of an unknown objective.
        """
        dit_net, extra = weights.load(dit, "dit", device)
        text_net, _ = weights.load(dit, "text", device)
        vae_net = load_vae(vae, device)
        assert isinstance(dit_net, DiT) and isinstance(text_net, ByteTextEncoder)
        if dit_net.channels != vae_net.latent_channels:
            raise DataError(
                f"the DiT in {dit} draws {dit_net.channels} latent channels, the VAE in {vae} has"
                f" {vae_net.latent_channels}; use the VAE that its latents were encoded with"
            )
        if vae_net.stride[0] != STRIDE[0]:
            raise DataError(f"the VAE in {vae} has a stride of {vae_net.stride[0]} in time; the DiT counts {STRIDE[0]}")
        objective = rebuilt(extra.get("objective", {"name": "flow"}))
        dropout = extra.get("caption_dropout")
        return cls(vae_net, dit_net, text_net, objective=objective, caption_dropout=dropout, batch=batch)

    def check(self, prompts: Sequence[str], height: int, width: int, frames: int, sampler: Sampler) -> None:
        """Refuse what cannot be drawn; warn of guidance by a net that has not learned to draw without a prompt.

        Raises:
            ConfigError: one line that names the key, the value and the mend.
        """
        check_size(height, width, frames, self.dit.patch, self.vae.stride)
        for prompt in prompts:
            check_prompt(prompt, sampler.guidance_scale)
        sampler.fitted(self.objective)
        if self.caption_dropout == 0 and sampler.guidance_scale != 1:
            log.warning(
                "sampler.guidance_scale=%s: the DiT was trained with conditioning.caption_dropout=0 and has never seen"
                " an empty prompt, which guidance leads away from; use sampler.guidance_scale=1",
                sampler.guidance_scale,
            )

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
        sampler: Sampler | None = None,
    ) -> list[np.ndarray]:
        """Return a clip for each prompt, uint8 `[T, H, W, 3]`.

        A clip's noise depends on (seed, prompt) alone, so its content does not depend on the others in its batch.

        Raises:
            ConfigError: a prompt, size or length that cannot be drawn, or a sampler that does not fit the weights.
        """
        sampler = sampler or Sampler()
        self.check(prompts, height, width, frames, sampler)
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
            latents = self.draw(some, shape, fps, seed, sampler)
            clips += [self.decode(latent) for latent in latents]
        return clips

    def decode(self, latent: Tensor) -> np.ndarray:
        """Return the clip, uint8 `[T, H, W, 3]`, of a latent `[C, t, h, w]`, made piece by piece."""
        pieces = self.vae.decode_stream([latent[None]], latent.shape[1], DECODED)
        return np.concatenate([to_uint8(piece)[0].cpu().numpy() for piece in pieces])

    def draw(self, prompts: Sequence[str], shape: tuple[int, ...], fps: float, seed: int, sampler: Sampler) -> Tensor:
        """Return latents `[B, C, t, h, w]` of `shape` for the prompts."""
        device, tokens = self.dit.head.weight.device, math.prod(shape[1:]) // self.dit.patch_size

        def noise(stream: str) -> Tensor:
            return torch.stack([keyed_normal(draw_of(seed, prompt), stream, shape, device) for prompt in prompts])

        levels = sampler.levels(self.objective, tokens).tolist()[:-1]
        texts = {
            guides: self.text(self.text.tokenize([*prompts, *[""] * (len(prompts) if guides else 0)]))
            for guides in sorted({sampler.guides(level) for level in levels})
        }

        def predict(x: Tensor, sigma: float) -> Tensor:
            level, guides = torch.tensor(sigma), sampler.guides(sigma)
            both = torch.cat((x, x)) if guides else x
            flat = flatten([[Segment(latent, level, fps)] for latent in both], self.dit.patch, self.dit.rope_time)
            out = flat.unflatten(self.dit(flat.tokens, *texts[guides]).float())
            answer = torch.stack([segments[0] for segments in out])
            return sampler.guided(answer[: len(x)], answer[len(x) :]) if guides else answer

        return sampler(
            predict, noise("noise"), objective=self.objective, tokens=tokens, noise=lambda step: noise(f"noise {step}")
        )


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
