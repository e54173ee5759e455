"""stage=captioner: train the captioner and its text encoder on the captions that the clips came with."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor

from soratrain.batch import VideoBatch
from soratrain.errors import DataError
from soratrain.models.captioner import Captioner
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

ORIGINAL = "gt"  # type of captions that came with a clip, whatever they say
PATIENCE = 16  # batches without a caption after which it is said that there are none


class CaptionerStage(TrainStage):
    """Language loss plus weighted contrastive loss (CoCa, Yu et al., 2022, equation 4).

    Exports `captioner` and `text`, the text encoder of the contrast, from which other stages' encoders may start.

    Args:
        net, text: factories of the captioner and of its text encoder.
        contrast_weight: of the contrastive loss beside the language loss.
        short_bytes: an original caption counts as `short` up to this many bytes, above as `long`.
    """

    captioner: Captioner
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
    ) -> None:
        nets = {"captioner": partial(net, text_dim=text.keywords["dim"]), "text": text}
        super().__init__(nets=nets, optimizer=optimizer, schedule=schedule, max_steps=max_steps)
        self.contrast_weight, self.short_bytes = contrast_weight, short_bytes
        self.silent = 0  # batches without captions, in a row

    def style_of(self, kind: str, caption: str) -> str:
        """Return the style that a caption of type `kind` teaches: its own, or by its length for an original one."""
        if kind and kind != ORIGINAL:
            return kind
        return "short" if len(caption.encode("utf-8", "replace")) <= self.short_bytes else "long"

    def training_step(self, batch: VideoBatch, batch_idx: int) -> Tensor:
        """Return the loss of one micro-batch; clips without a caption give none.

        Raises:
            DataError: many batches in a row have no captions.
        """
        told = [bool(caption) for caption in batch.captions]
        self.silent = 0 if any(told) else self.silent + 1
        if self.silent == PATIENCE:
            raise DataError(
                f"{PATIENCE} batches in a row, such as that of clip {batch.keys[0]}, have no captions; write"
                " them beside the videos (NAME.txt) and prepare again, or describe the clips with a captioner trained"
                " elsewhere: stage=recaption inputs.captioner=outputs/default/captioner/base"
            )
        kinds = batch.styles or (ORIGINAL,) * len(batch)
        styles = [self.style_of(kind, caption) for kind, caption in zip(kinds, batch.captions, strict=True)]
        pairs = [pair for pair in zip(batch.captions, styles, strict=True) if pair[0]]
        self.captioner.teach([caption for caption, _ in pairs], [style for _, style in pairs])
        features, packing = self.text(self.text.tokenize(batch.captions))
        language, contrast = self.captioner(batch.pixels(), batch.fps, batch.captions, styles, packing.mean(features))
        heard = language.new_tensor(told)
        loss = batch.mean(heard * (language + self.contrast_weight * contrast))
        self.report_captions(batch)
        self.report(loss=loss, language=language.mean(), contrast=contrast.mean(), samples=len(batch))
        return loss

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
