"""Train the DiT, and the text encoder with it, on cached latents."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.batch import LatentBatch
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.segments import Segment, flatten
from soratrain.errors import ConfigError, DataError
from soratrain.models.dit import DiT
from soratrain.models.patchify import patchify_target
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage


class DiTStage(TrainStage):
    """Noise in, prediction out, one loss a sample.

    Args:
        dit: factory of the DiT.
        text: factory of the text encoder.
        objective: what is predicted, at which noise levels.
        caption_dropout: share of captions replaced by the empty prompt, which guidance needs.
        text_init: folder whose text encoder this one starts from (a captioner's contrastive text tower, say), or None.

    Raises:
        ConfigError: `caption_dropout` is no share.
    """

    dit: DiT
    text: ByteTextEncoder

    def __init__(
        self,
        *,
        dit: partial,
        text: partial,
        objective: Objective,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_steps: int,
        caption_dropout: float = 0.1,
        text_init: str | None = None,
    ) -> None:
        super().__init__(nets={"dit": dit, "text": text}, optimizer=optimizer, schedule=schedule, max_steps=max_steps)
        if not 0 <= caption_dropout <= 1:
            raise ConfigError(f"conditioning.caption_dropout={caption_dropout} must lie in [0, 1]")
        self.objective, self.caption_dropout = objective, caption_dropout
        if text_init:
            self.start_from("text", text_init)

    def training_step(self, batch: LatentBatch, batch_idx: int) -> Tensor:
        """Return the micro-batch's loss: per sample the mean over its tokens, weighted as the batch says."""
        clean = [latent.float() for latent in batch.latents]
        if clean[0].shape[0] != self.dit.channels:
            raise DataError(
                f"the latents have {clean[0].shape[0]} channels, the DiT takes {self.dit.channels}; set dit.channels,"
                " or encode with the VAE that it is meant for"
            )
        device = clean[0].device
        noise = batch.normal("noise", [latent.shape for latent in clean], device)
        counts = torch.tensor([latent[0].numel() for latent in clean]) // self.dit.patch_size
        sigma = self.objective.levels(batch.uniform("sigma"), counts)
        samples, targets = [], []
        for latent, draw, level, fps in zip(clean, noise, sigma, batch.fps.tolist(), strict=True):
            samples.append([Segment(self.objective.noised(latent, draw, level), level, fps)])
            targets.append(patchify_target(self.objective.target(latent, draw, level), self.dit.patch))
        flat = flatten(samples, self.dit.patch, self.dit.rope_time)
        dropped = (batch.uniform("caption") < self.caption_dropout).tolist()
        captions = ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
        prediction = self.dit(flat.tokens, *self.text(self.text.tokenize(captions)))
        errors = (prediction.float() - torch.cat(targets)).square().mean(-1)
        loss = batch.mean(flat.mean(errors) * self.objective.weight(sigma).to(device))
        self.report_captions(batch)
        self.report(loss=loss, tokens=flat.tokens.packing.total, samples=len(batch))
        return loss

    def exported(self) -> dict[str, tuple[nn.Module, partial, dict[str, Any]]]:
        """Return both nets; beside the DiT, what it was trained for, and whether guidance can use it."""
        nets = super().exported()
        module, factory, extra = nets["dit"]
        learned = {"objective": asdict(self.objective), "caption_dropout": self.caption_dropout}
        return {**nets, "dit": (module, factory, {**extra, **learned})}
