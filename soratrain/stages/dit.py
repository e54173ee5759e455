"""Train the DiT, and its text encoder or a frozen one's null, on latents: cached ones, or made live by a frozen VAE."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.batch import LatentBatch, VideoBatch
from soratrain.data.datamodule import LatentData
from soratrain.data.plan import Plan
from soratrain.diffusion.arrange import Case, Sample, arrange
from soratrain.diffusion.conditioning import MODES, Conditioning
from soratrain.diffusion.objective import Objective, learned
from soratrain.diffusion.segments import flatten
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import FrozenText, TextEncoder
from soratrain.models.patchify import grid_of
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import CAPTIONS, MODES_SHOWN, TrainStage
from soratrain.stages.beside import latents_stride, running
from soratrain.stages.live import LiveEncoder
from soratrain.stages.plan_scale import DiTWork
from soratrain.stages.work import TrainingFlops

log = logging.getLogger(__name__)


class DiTStage(TrainStage):
    """Noise in, prediction out, one loss a sample.

    Args:
        dit: factory of the DiT.
        text: factory of the text encoder, trained along or frozen (`FrozenText`).
        objective: what is predicted, at which noise levels.
        conditioning: which parts of clips and captions are given; by default captions alone.
        text_init: folder whose text encoder this one starts from (a captioner's contrastive text tower, say), or None.
        vae: folder of the VAE that makes latents of clips; None where the data are latents.
        pixels_per_batch: see `LiveEncoder`.

    Raises:
        ConfigError: a value out of range.
    """

    dit: DiT
    text: TextEncoder

    def __init__(
        self,
        *,
        dit: partial,
        text: partial,
        objective: Objective,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_steps: int,
        conditioning: Conditioning | None = None,
        text_init: str | None = None,
        vae: str | None = None,
        pixels_per_batch: int = 1 << 22,
    ) -> None:
        super().__init__(nets={"dit": dit, "text": text}, optimizer=optimizer, schedule=schedule, max_steps=max_steps)
        self.objective, self.conditioning = objective, conditioning or Conditioning()
        self.vae, self.live = vae, None if vae is None else LiveEncoder(vae, pixels_per_batch)
        self.cut = 0
        self.flops: TrainingFlops | None = None
        if text_init:
            self.start_from("text", text_init)

    def start_from(self, name: str, folder: str | Path, stored_as: str = "") -> None:
        """Let a net begin with the weights in `folder`.

        Raises:
            ConfigError: they are a DiT's that answers another question than this objective asks.
            DataError: the folder does not hold them.
        """
        super().start_from(name, folder, stored_as)
        if name == "dit":
            theirs = learned(weights.document_of(folder, stored_as or name).get("extra", {}))
            if (theirs.name, theirs.prediction) != (self.objective.name, self.objective.prediction):
                raise ConfigError(
                    f"init={folder}: its DiT was trained with objective={theirs.name} and"
                    f" objective.prediction={theirs.prediction}, this run has objective={self.objective.name} and"
                    f" objective.prediction={self.objective.prediction}; use those, or begin without init"
                )

    def activations(self, plan: Plan, nets: Mapping[str, nn.Module], half: bool) -> int | None:
        sequence = getattr(self.trainer.strategy, "sequence", 1)
        stride = latents_stride(self.vae, self.trainer)
        work = DiTWork(nets["dit"], stride, half=half, sequence=sequence, conditioning=self.conditioning)
        return work.activations(work.largest(plan))

    def beside(self, nets: Mapping[str, nn.Module]) -> tuple[Mapping[str, int], str]:
        return running(self.vae, nets.get("text"), self.trainer)

    def configure_model(self) -> None:
        """Build the nets, and load the VAE where latents are made live.

        Raises:
            ConfigError: they do not go together.
        """
        super().configure_model()
        self.conditioning.check_patch(self.dit.patch)
        if self.live is not None:
            self.live.load(self.dit.channels)

    def on_fit_start(self) -> None:
        """See that a frozen text encoder is there, and that stored features are its own.

        Raises:
            ConfigError, DataError: it is another, or cannot be read.
        """
        if isinstance(self.text, FrozenText):
            data: Any = getattr(self.trainer, "datamodule", None)
            said = self.text.begin(data.stored_texts() if isinstance(data, LatentData) else {})
            if self.trainer.is_global_zero:
                log.info("%s", said)

    def on_train_start(self) -> None:
        """See that a checkpoint that is gone on from was trained with the same frozen text encoder.

        Raises:
            DataError: it was another.
        """
        if isinstance(self.text, FrozenText):
            self.text.confirm()

    def training_step(self, batch: LatentBatch | VideoBatch, batch_idx: int) -> Tensor:
        """Return the micro-batch's loss: per sample the mean over its supervised tokens, weighted as the batch says.

        Raises:
            DataError: the latents are not of the channels that the DiT takes.
        """
        latents = self.encoded(batch)
        channels = latents.latents[0].shape[0]
        if channels != self.dit.channels:
            raise DataError(
                f"the latents have {channels} channels, the DiT takes {self.dit.channels}; set dit.channels,"
                " or encode with the VAE that it is meant for"
            )
        cases = self.cases(latents)
        losses, packing, words = self.losses(latents, cases)
        loss = batch.mean(losses)
        self.report_captions(batch)
        if said := self.silence(batch):
            log.warning("%s: prompts mean nothing to the DiT; caption the clips, or see data.caption_types", said)
        if self.conditioning.mixed:
            self.report_modes(cases)
        self.report(loss=loss, tokens=packing.total, samples=len(batch), **self.worked(packing, words))
        return loss

    def worked(self, packing: Packing, words: Packing) -> dict[str, float]:
        """Return the operations that a micro-batch needed, and the positions by which ranks that share it pad it."""
        if self.flops is None:
            self.flops = TrainingFlops(self.factories["dit"])
        sharing = getattr(self.trainer.strategy, "sequence", 1) if self._trainer is not None else 1
        return {"flops": self.flops(packing.lengths, words.lengths), "padded": -packing.total % sharing}

    def encoded(self, batch: LatentBatch | VideoBatch) -> LatentBatch:
        """Return a batch of latents, made live where it is one of clips."""
        if isinstance(batch, LatentBatch):
            return batch
        assert self.live is not None, "clips need a VAE: latents=live"
        return self.live(batch, self.conditioning.tail_frames)

    def cases(self, batch: LatentBatch) -> list[Case]:
        """Return how each sample is shown; it depends on the sample's draw, and on how far the run has come."""
        done = self.global_step / self.max_steps if self._trainer is not None else 1.0
        tails = batch.tails or ({},) * len(batch)
        return [
            self.conditioning.case(draw, grid_of(latent, self.dit.patch), self.dit.patch, ends.keys(), done)
            for draw, latent, ends in zip(batch.draws.tolist(), batch.latents, tails, strict=True)
        ]

    def losses(self, batch: LatentBatch, cases: Sequence[Case]) -> tuple[Tensor, Packing, Packing]:
        """Return each sample's loss `[B]` at a level of its own, and the packings of tokens and text."""
        counts = torch.tensor([latent[0].numel() for latent in batch.latents]) // self.dit.patch_size
        sigma = self.objective.levels(batch.uniform("sigma"), counts)
        text = self.read(batch)
        return *self.losses_at(sigma, batch, cases, text), text[1]

    def losses_at(
        self, sigma: Tensor, batch: LatentBatch, cases: Sequence[Case], text: tuple[Tensor, Packing]
    ) -> tuple[Tensor, Packing]:
        """Return each sample's loss `[B]` at noise levels `sigma` `[B]`, and the packing of the tokens.

        Args:
            text: features of the samples' captions, and their packing.
        """
        clean = [latent.float() for latent in batch.latents]
        device, patch = clean[0].device, self.dit.patch
        noise = batch.normal("noise", [latent.shape for latent in clean], device)
        tails = [batch.tails[place][case.tail].float() if case.tail else None for place, case in enumerate(cases)]
        parts = zip(clean, noise, sigma, batch.fps.tolist(), batch.draws.tolist(), tails, strict=True)
        shown = [
            arrange(Sample(*part), case, self.objective, patch, self.dit.rope_time)
            for part, case in zip(parts, cases, strict=True)
        ]
        flat = flatten([item.segments for item in shown], patch, self.dit.rope_time)
        prediction = self.dit(flat.tokens, *text)
        errors = (prediction.float() - torch.cat([item.target for item in shown])).square().mean(-1)
        weight = self.objective.weight(sigma).to(device)
        if any(item.weights is not None for item in shown):
            own = torch.tensor([item.weights is not None for item in shown], device=device)
            weight = weight.masked_fill(own, 1.0)
            errors = errors * torch.cat(
                [errors.new_ones(len(item.target)) if item.weights is None else item.weights for item in shown]
            )
        return flat.mean(errors) * weight, flat.tokens.packing

    def read(self, batch: LatentBatch) -> tuple[Tensor, Packing]:
        """Return the features of all captions, those of the empty prompt where one is dropped, and their packing."""
        dropped = (batch.uniform("caption") < self.conditioning.caption_dropout).tolist()
        captions = ["" if drop else text for text, drop in zip(batch.captions, dropped, strict=True)]
        tokens = self.text.tokenize(captions, batch.text)
        self.report(**{f"{CAPTIONS}cut": tokens.truncated})
        if tokens.truncated and not self.cut:
            log.warning(
                "captions longer than text.max_tokens=%d are cut; captions_cut counts them", self.text.max_tokens
            )
        self.cut += tokens.truncated
        return self.text(tokens)

    def report_modes(self, cases: Sequence[Case]) -> None:
        """Report as what clips were shown, and how many were too short for it; the same names on every rank."""
        found = Counter(case.mode for case in cases)
        found["too_short"] = sum(case.mode != case.asked for case in cases)
        self.report(**{f"{MODES_SHOWN}{name}": found[name] for name in ("t2v", *MODES, "too_short")})

    def exported(self) -> dict[str, tuple[nn.Module, partial, dict[str, Any]]]:
        """Return both nets; beside the DiT, what it was trained for, what it was given, and if guidance can use it.

        Beside a frozen text encoder's null stands which encoder it goes with, whose own weights are not copied.
        """
        nets = super().exported()
        module, factory, extra = nets["dit"]
        given = {**asdict(self.conditioning), "mix": dict(self.conditioning.mix)}
        given["tail_frames"] = list(self.conditioning.tail_frames)
        dropout = given.pop("caption_dropout")
        learned = {"objective": asdict(self.objective), "caption_dropout": dropout, "conditioning": given}
        nets["dit"] = module, factory, {**extra, **learned}
        if isinstance(self.text, FrozenText):
            module, factory, extra = nets["text"]
            nets["text"] = module, factory, {**extra, "encoder": self.text.record()}
        return nets
