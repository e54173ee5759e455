"""Frames through a vision encoder of Hugging Face: CLIP's, SigLIP's, DINOv2, ViT and their like, at any aspect ratio.

A frame is resized to about as many patches as are asked for, its aspect ratio kept to the nearest patch, and the
encoder's position embeddings are stretched to that grid: nothing is cut off and nothing is squeezed into a square.

Legend: M frames, P patches (and what else the encoder adds), D width.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from soratrain.errors import ConfigError
from soratrain.models.hf_tower import Tower

# The half that sees, of models that have another; of all others, the whole.
SEEING = {
    "clip": "CLIPVisionModel",
    "clip_vision_model": "CLIPVisionModel",
    "siglip": "SiglipVisionModel",
    "siglip_vision_model": "SiglipVisionModel",
}
BY_THEMSELVES = ("dinov2", "dinov2_with_registers", "dinov3_vit")  # take any grid without being told
ASIDE = ("text_model.", "text_projection.", "visual_projection.", "logit_")  # names of tensors that see nothing
AT_ONCE = 64  # frames that a frozen encoder sees in one call


def grid(height: int, width: int, patches: int) -> tuple[int, int]:
    """Return rows and columns of patches for a frame: at most `patches`, as near to its aspect ratio as they come."""
    rows = min(max(1, round(math.sqrt(patches * height / width))), patches)
    columns = min(max(1, round(math.sqrt(patches * width / height))), patches)
    while rows * columns > patches:
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows, columns


class VisionTower(Tower):
    """Frames in, the encoder's last states out.

    Args:
        patches: most that a frame is cut into.
        skip: layers left out at the end (1 for CLIP, whose last one only serves its class token).
        options: those of `Tower`.

    Attributes:
        width: D.

    Raises:
        ConfigError: it is no encoder of patches, or takes squares only.
    """

    outer = "vision_model."

    def __init__(self, *, patches: int, skip: int, **options: Any) -> None:
        self.patches, self.skip = patches, skip
        super().__init__(key="captioner.vision", called="vision encoder", **options)
        folder, size = self.place.folder, getattr(self.config, "patch_size", None)
        if not isinstance(size, int):
            raise ConfigError(f"captioner.vision={folder}: a {self.config.model_type} does not cut frames into patches")
        if patches < 1:
            raise ConfigError(f"captioner.patches={patches}: must be at least 1")
        self.patch_size, self.width = size, int(self.config.hidden_size)
        self.mean, self.std = self.normalization()
        for name, param in self.named_parameters():
            if name.endswith("mask_token"):  # stands for patches that are hidden, and none are
                param.requires_grad_(False)

    def form(self, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the half that sees, and its config without the layers that are left out."""
        reader = getattr(self.library, SEEING.get(stored["model_type"], "AutoModel"))
        configs = getattr(reader, "config_class", None) or self.library.AutoConfig
        config = configs.from_pretrained(self.place.folder)
        layers = getattr(config, "num_hidden_layers", 0)
        if not 0 <= self.skip < max(layers, 1):
            raise ConfigError(f"captioner.skip_layers={self.skip}: {self.place.folder} has {layers} layers")
        config.num_hidden_layers = layers - self.skip
        return reader, config

    def counts(self, name: str) -> bool:
        """Return whether a tensor belongs to the half that sees."""
        return not name.startswith(ASIDE) and not name.endswith(".position_ids")

    def marks(self) -> str:
        """Return how frames are prepared, and which layers are used."""
        return f"{self.config.hidden_size} {self.config.num_hidden_layers} {self.mean} {self.std}"

    def normalization(self) -> tuple[Sequence[float], Sequence[float]]:
        """Return the colours' means and standard deviations that the encoder is used to, of values in [0, 1]."""
        for name in ("preprocessor_config.json", "processor_config.json"):
            with self.place.reading():
                file = self.place.file(name)
                said = json.loads(file.read_text(encoding="utf-8")) if file else {}
            said = said.get("image_processor") or said
            if "image_mean" in said and "image_std" in said:
                return tuple(said["image_mean"]), tuple(said["image_std"])
        return (0.5,) * 3, (0.5,) * 3

    def prepared(self, frames_MCHW: Tensor) -> Tensor:
        """Return frames in [-1, 1] of the size and in the colours that the encoder takes."""
        height, width = frames_MCHW.shape[-2:]
        rows, columns = grid(height, width, self.patches)
        size = rows * self.patch_size, columns * self.patch_size
        if (height, width) != size:
            frames_MCHW = F.interpolate(frames_MCHW, size, mode="bilinear", antialias=True, align_corners=False)
        mean, std = (frames_MCHW.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((frames_MCHW + 1) / 2 - mean) / std

    def forward(self, frames_MCHW: Tensor) -> Tensor:
        """Return the states `[M, P, D]` of frames in [-1, 1].

        An encoder that is trained sees all frames in one call: under ZeRO-3 ranks must make equally many.
        """
        net, taken = self.here(), self.prepared(frames_MCHW)
        if self.tuning == "frozen":
            with torch.no_grad():
                return torch.cat([self.states(net, part) for part in taken.split(AT_ONCE)])
        return self.states(net, taken)

    def states(self, net: Any, frames_MCHW: Tensor) -> Tensor:
        """Return the states of prepared frames.

        Raises:
            ConfigError: the encoder takes squares only.
        """
        options = {}
        if self.config.model_type not in BY_THEMSELVES:
            if "interpolate_pos_encoding" not in inspect.signature(net.forward).parameters:
                raise ConfigError(
                    f"captioner.vision={self.place.folder}: a {self.config.model_type} takes frames of one size only;"
                    " use CLIP, SigLIP, ViT or DINOv2"
                )
            options["interpolate_pos_encoding"] = True
        dtype = next(net.parameters()).dtype
        answer = net(pixel_values=frames_MCHW.to(dtype), **options)
        states, pooled = answer.last_hidden_state, getattr(answer, "pooler_output", None)
        if (
            pooled is not None and self.tuning != "frozen"
        ):  # parameters that see nothing enter the graph too, or DDP waits
            states = states + 0.0 * pooled.sum()
        return states
