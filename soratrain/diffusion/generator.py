"""Trained nets at work: pixels to latents and back, and what a layout leaves open drawn from noise.

What `stage=sample` and `stage=evaluate` share.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from soratrain.batch import draw_of, keyed_normal, to_pixels, to_uint8
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective, learned
from soratrain.diffusion.sampler import Sampler
from soratrain.diffusion.segments import flatten
from soratrain.diffusion.sizes import check_prompt, check_size
from soratrain.diffusion.ways import Layout
from soratrain.errors import DataError
from soratrain.models import weights
from soratrain.models.attention import Packing
from soratrain.models.autoencoders import load_vae
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import TextEncoder
from soratrain.models.patchify import STRIDE
from soratrain.models.tiles import LEAST
from soratrain.models.vae import VAE

log = logging.getLogger(__name__)

DECODED = 1 << 22  # pixels decoded at once: what a VAE keeps of a clip in between is many times as large


class Generator:
    """Text, and what is given of a clip, to clips.

    Args:
        vae, dit, text: the nets, in eval mode, on one device.
        objective: the one that the DiT was trained for.
        caption_dropout: share of captions that it was trained without; None where that is not known.
        mix: shares of the ways in which it was given parts of clips in training; None where that is not known.
        batch: most clips drawn at once.
        precision: `bf16-mixed` runs the nets under autocast, `32-true` does not; noise levels, steps and latents are
            fp32 in both.
    """

    def __init__(
        self,
        vae: VAE,
        dit: DiT,
        text: TextEncoder,
        *,
        objective: Objective | None = None,
        caption_dropout: float | None = None,
        mix: Mapping[str, float] | None = None,
        batch: int = 16,
        precision: str = "32-true",
    ) -> None:
        self.vae, self.dit, self.text, self.batch, self.precision = vae, dit, text, batch, precision
        self.objective: Objective = Flow() if objective is None else objective
        self.caption_dropout, self.mix = caption_dropout, mix

    @classmethod
    def load(cls, vae: str | Path, dit: str | Path, *, device: torch.device | str = "cpu", **options: Any) -> Generator:
        """Return a generator from the folders of a trained VAE and a trained DiT; `options`: batch, precision.

        Raises:
            DataError: weights are missing, do not fit each other, or are of an unknown objective; or the frozen text
                encoder that they go with is not there, or is another.
        """
        dit_net, extra = weights.load(dit, "dit", device)
        text_net, _ = weights.load(dit, "text", device)
        vae_net = load_vae(vae, device)
        assert isinstance(dit_net, DiT) and isinstance(text_net, TextEncoder)
        if dit_net.channels != vae_net.latent_channels:
            raise DataError(
                f"the DiT in {dit} draws {dit_net.channels} latent channels, the VAE in {vae} has"
                f" {vae_net.latent_channels}; use the VAE that its latents were encoded with"
            )
        if vae_net.stride[0] != STRIDE[0]:
            raise DataError(f"the VAE in {vae} has a stride of {vae_net.stride[0]} in time; the DiT counts {STRIDE[0]}")
        objective = learned(extra)
        known = {"caption_dropout": extra.get("caption_dropout"), "mix": extra.get("conditioning", {}).get("mix")}
        return cls(vae_net, dit_net, text_net, objective=objective, **known, **options)

    @property
    def device(self) -> torch.device:
        """Where the nets are."""
        return self.dit.head.weight.device

    @property
    def half(self) -> bool:
        """Whether nets run in 16 bits."""
        return self.precision.startswith("bf16")

    def autocast(self) -> AbstractContextManager[None]:
        """Return a context in which nets run in the generator's precision.

        Weights are cast at each use: each is used once in a forward, and kept ones would take half as much again.
        """
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half, cache_enabled=False)

    def _each(self, pieces: Iterable[Tensor]) -> Iterator[Tensor]:
        """Yield the pieces, each made in the generator's precision; what the caller does between is not."""
        pieces = iter(pieces)
        while True:
            with self.autocast():
                piece = next(pieces, None)
            if piece is None:
                return
            yield piece

    def shape(self, height: int, width: int, frames: int) -> tuple[int, int, int, int]:
        """Return (C, t, h, w) of a clip's latent."""
        time, high, wide = self.vae.stride
        return self.dit.channels, 1 + (frames - 1) // time, height // high, width // wide

    def check(self, prompts: Sequence[str], height: int, width: int, frames: int, sampler: Sampler) -> None:
        """Refuse what cannot be drawn.

        Raises:
            ConfigError: one line that names the key, the value and the mend.
        """
        check_size(height, width, frames, self.dit.patch, self.vae.stride)
        self.check_prompts(prompts, sampler)

    def check_prompts(self, prompts: Sequence[str], sampler: Sampler) -> None:
        """Refuse prompts and samplers that cannot draw; say how many prompts are longer than is read.

        Guidance by a net that has not learned to draw without a prompt is warned of.

        Raises:
            ConfigError: one line that names the key, the value and the mend.
        """
        for prompt in prompts:
            check_prompt(prompt, sampler.guidance_scale)
        sampler.fitted(self.objective)
        if self.caption_dropout == 0 and sampler.guidance_scale != 1:
            log.warning(
                "sampler.guidance_scale=%s: the DiT was trained with conditioning.caption_dropout=0 and has never seen"
                " an empty prompt, which guidance leads away from; use sampler.guidance_scale=1",
                sampler.guidance_scale,
            )
        tokens = self.text.tokenize(prompts)
        if tokens.truncated:
            log.warning(
                "%d of %d prompts are longer than %d tokens; what follows is not read",
                tokens.truncated,
                len(prompts),
                self.text.max_tokens,
            )

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
            ConfigError: a prompt, size or length that cannot be drawn.
        """
        sampler = sampler or Sampler()
        self.check(prompts, height, width, frames, sampler)
        layout = Layout(self.shape(height, width, frames), fps)
        clips: list[np.ndarray] = []
        for start in range(0, len(prompts), self.batch):
            some = prompts[start : start + self.batch]
            draws = [draw_of(seed, prompt) for prompt in some]
            clips += [self.decode(latent) for latent in self.draw([layout] * len(some), some, draws, sampler)]
        return clips

    @torch.no_grad()  # not inference_mode: what ZeRO-3 gathers in it could not be trained afterwards
    def draw(
        self,
        layouts: Sequence[Layout],
        prompts: Sequence[str],
        draws: Sequence[int],
        sampler: Sampler,
        *,
        strength: float = 1.0,
        name: str = "noise",
    ) -> Tensor:
        """Return the drawn stretches `[B, C, t, h, w]` of layouts of equal shapes.

        Args:
            draws: a seed for each, on which its noise alone depends.
            strength: the noise level at which a run starts that has a base: 1 is pure noise.
            name: tells apart what is drawn from one seed.
        """
        layouts = [layout.to(self.device) for layout in layouts]
        with self.autocast():
            texts = Texts(self.text, prompts)
        tokens = layouts[0].duration * layouts[0].shape[2] * layouts[0].shape[3] // self.dit.patch_size
        start = float(sampler.levels(self.objective, tokens, strength)[0])
        pure = [keyed_normal(draw, name, layouts[0].shape, self.device) for draw in draws]
        x = torch.stack([self._begin(*pair, start) for pair in zip(layouts, pure, strict=True)])
        free = None
        if layouts[0].known is not None:
            free = torch.stack([~known for layout in layouts if (known := layout.known) is not None])[:, None]

        def predict(x: Tensor, sigma: float) -> Tensor:
            if not sampler.guides(sigma):
                return self._predict(layouts, x, sigma, texts.prompts)
            out = self._predict([*layouts, *layouts], torch.cat((x, x)), sigma, texts.both)
            return sampler.guided(out[: len(x)], out[len(x) :], free)

        def fresh(step: int) -> Tensor:
            return torch.stack([keyed_normal(draw, f"{name} {step}", x.shape[1:], self.device) for draw in draws])

        return sampler(predict, x, objective=self.objective, tokens=tokens, free=free, start=strength, noise=fresh)

    def _begin(self, layout: Layout, noise: Tensor, sigma: float) -> Tensor:
        """Return what a run starts from, at the noise level `sigma`."""
        if layout.base is None:
            return noise
        noised = self.objective.noised(layout.base, noise, torch.tensor(sigma, device=noise.device))
        return noised if layout.known is None else torch.where(layout.known, layout.base, noised)

    def _predict(self, layouts: Sequence[Layout], x: Tensor, sigma: float, text: tuple[Tensor, Packing]) -> Tensor:
        """Return the net's own prediction for the drawn stretches."""
        patch, rope_time = self.dit.patch, self.dit.rope_time
        samples = [layout.segments(drawn, sigma, patch, rope_time) for layout, drawn in zip(layouts, x, strict=True)]
        flat = flatten(samples, patch, rope_time)
        with self.autocast():
            out = self.dit(flat.tokens, *text)
        parts_of = flat.unflatten(out.float())
        return torch.stack([parts[len(layout.before)] for layout, parts in zip(layouts, parts_of, strict=True)])

    @torch.inference_mode()
    def encode(self, frames: Iterable[np.ndarray]) -> Iterator[Tensor]:
        """Yield the latent `[C, any, h, w]` of a clip of 1 + 4k frames, uint8 `[H, W, 3]` each, as one stream."""
        pixels = (to_pixels(torch.from_numpy(frame)[None, None].to(self.device)) for frame in frames)
        for latent in self._each(self.vae.encode_stream(pixels, pixels_per_step=max(DECODED, LEAST))):
            yield latent[0]

    def encoded(self, frames: Iterable[np.ndarray]) -> Tensor:
        """Return the whole latent `[C, t, h, w]` of a clip of 1 + 4k frames, uint8 `[H, W, 3]` each."""
        return torch.cat(list(self.encode(frames)), dim=1)

    @torch.inference_mode()
    def decode_stream(self, latents: Iterable[Tensor]) -> Iterator[np.ndarray]:
        """Yield the frames, uint8 `[H, W, 3]`, of latents `[C, any, h, w]` that follow each other, as one stream."""
        pieces = self.vae.decode_stream((latent[None] for latent in latents), pixels_per_step=DECODED)
        for piece in self._each(pieces):
            yield from to_uint8(piece)[0].cpu().numpy()

    @torch.inference_mode()
    def decode(self, latent: Tensor) -> np.ndarray:
        """Return the clip, uint8 `[T, H, W, 3]`, of a latent `[C, t, h, w]`, made piece by piece."""
        pieces = self._each(self.vae.decode_stream([latent[None]], latent.shape[1], DECODED))
        return np.concatenate([to_uint8(piece)[0].cpu().numpy() for piece in pieces])


class Texts:
    """Features of prompts, and of the empty prompt for each, which guidance needs."""

    def __init__(self, encoder: TextEncoder, prompts: Sequence[str]) -> None:
        self.both: tuple[Tensor, Packing] = encoder(encoder.tokenize([*prompts, *[""] * len(prompts)]))
        features, packing = self.both
        own = Packing(packing.lengths[: len(prompts)])
        self.prompts = (features[: own.total], own)
