"""stage=captioner: train the captioner and its text encoder on the captions that the clips came with."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn

from soratrain.batch import VideoBatch
from soratrain.errors import DataError
from soratrain.models.caption_model import CaptionModel
from soratrain.models.text import ByteTextEncoder
from soratrain.models.writing import clean
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import CAPTIONS, PATIENCE, TrainStage
from soratrain.stages.beside import Beside, frozen_nets

log = logging.getLogger(__name__)

ORIGINAL = "gt"  # type of captions that came with a clip, whatever they say
ENOUGH = 256  # captions, in at least as many batches, among which one of a style that must come would have been


class CaptionerStage(TrainStage):
    """Language loss plus weighted contrastive loss (CoCa, Yu et al., 2022, equation 4).

    Exports `captioner` and `text`, the text encoder of the contrast, from which other stages' encoders may start.

    Args:
        net, text: factories of the captioner, of either body, and of its text encoder.
        contrast_weight: of the contrastive loss beside the language loss.
        short_bytes: an original caption counts as `short` up to this many bytes, above as `long`.
        teaches: styles of which captions must come.
    """

    captioner: CaptionModel
    text: ByteTextEncoder

    def __init__(
        self,
        *,
        net: partial,
        text: partial,
        optimizer: OptimizerFactory,
        schedule: Schedule,
        max_steps: int,
        contrast_weight: float = 0.2,
        short_bytes: int = 100,
        teaches: Sequence[str] = (),
    ) -> None:
        nets = {"captioner": partial(net, text_dim=text.keywords["dim"]), "text": text}
        super().__init__(nets=nets, optimizer=optimizer, schedule=schedule, max_steps=max_steps)
        self.contrast_weight, self.short_bytes = contrast_weight, short_bytes
        self.awaited = list(teaches)  # styles that have not come yet, since training began
        self.waited = self.heard = 0  # batches and captions since then
        self.cut = 0  # captions longer than the captioner or its text encoder reads

    def beside(self, nets: Mapping[str, nn.Module]) -> tuple[Mapping[str, int], str]:
        """Return the bytes of others' nets that are not trained, by name; all of them are counted."""
        found = Beside()
        frozen_nets(nets.values(), found)
        return found.bytes, found.said

    def style_of(self, kind: str, caption: str) -> str:
        """Return the style that a caption of type `kind` teaches: its own, or by its length for an original one."""
        if kind and kind != ORIGINAL:
            return kind
        return "short" if len(caption.encode("utf-8", "replace")) <= self.short_bytes else "long"

    def on_fit_start(self) -> None:
        """See that what the captioner is made of is there, before the first step."""
        self.captioner.style_ids(self.awaited)
        self.captioner.confirm()

    def on_train_start(self) -> None:
        """See that a checkpoint that is gone on from was trained with the same."""
        self.captioner.confirm()

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch; clips without a caption give none.

        Raises:
            DataError: many batches in a row have no captions, or many captions are none of a style that must come.
        """
        batch = replace(batch, captions=tuple(clean(caption) for caption in batch.captions))
        told = [bool(caption) for caption in batch.captions]
        kinds = batch.styles or (ORIGINAL,) * len(batch)
        styles = [self.style_of(kind, caption) for kind, caption in zip(kinds, batch.captions, strict=True)]
        pairs = [pair for pair in zip(batch.captions, styles, strict=True) if pair[0]]
        self.watch(batch, [style for _, style in pairs])
        longer = self.captioner.teach([caption for caption, _ in pairs], [style for _, style in pairs])
        tokens = self.text.tokenize(batch.captions)
        self.count_cut(longer, tokens.truncated)
        features, packing = self.text(tokens)
        language, contrast = self.captioner(batch.pixels(), batch.fps, batch.captions, styles, packing.mean(features))
        heard = language.new_tensor(told)
        loss = batch.mean(heard * (language + self.contrast_weight * contrast))
        self.report_captions(batch)
        self.report(loss=loss, samples=len(batch))
        clips = max(sum(told), 1)
        self.report(language=(heard * language).sum() / clips, contrast=(heard * contrast).sum() / clips)
        return loss

    def watch(self, batch: VideoBatch, styles: Sequence[str]) -> None:
        """Refuse to go on without captions.

        Raises:
            DataError: says whence captions may come.
        """
        if said := self.silence(batch):
            raise DataError(
                f"{said}; write them beside the videos (NAME.txt) and prepare again, or describe the clips with a"
                " captioner trained elsewhere: stage=recaption inputs.captioner=outputs/default/captioner/base"
            )
        self.awaited = [style for style in self.awaited if style not in styles]
        self.waited, self.heard = self.waited + 1, self.heard + len(styles)
        if self.awaited and self.waited >= PATIENCE and self.heard >= ENOUGH:
            raise DataError(
                f"stage.module.teaches={self.awaited}: none of {self.heard} captions was of style"
                f" {self.awaited[0]!r}; bring captions of that type (beside the videos, NAME.json) and give it a weight"
                " in data.caption_types, or leave the style out of teaches"
            )

    def count_cut(self, longer: int, truncated: int) -> None:
        """Count captions that are longer than they are read, and say so once."""
        self.report(**{f"{CAPTIONS}cut": max(longer, truncated)})
        if (longer or truncated) and not self.cut:
            log.warning(
                "captions longer than the captioner writes (%s of it) or its text encoder reads (%s tokens) are cut;"
                " captions_cut counts them",
                self.captioner.most,
                self.text.max_tokens,
            )
        self.cut += longer or truncated

    def finalize(self) -> None:
        """Remember the longest captions that any rank has seen."""
        self.share_lengths()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Do so before a checkpoint too: only the first rank's buffers are saved."""
        super().on_save_checkpoint(checkpoint)
        self.share_lengths()

    def share_lengths(self) -> None:
        """Take each style's longest caption over all ranks."""
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(self.captioner.longest, op=dist.ReduceOp.MAX)

    def exported(self) -> dict[str, tuple[nn.Module, partial, dict[str, Any]]]:
        """Return both nets; beside the captioner stands whose nets it goes with, whose weights are not copied."""
        nets = super().exported()
        module, factory, extra = nets["captioner"]
        nets["captioner"] = module, factory, {**extra, **self.captioner.record()}
        return nets
