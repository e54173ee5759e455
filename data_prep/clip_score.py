"""`aesthetic`: how much people like a picture, as LAION predicts it from CLIP's image embedding.

The embedding, of length 1, goes through a head: one linear layer (aesthetic-predictor, 2022), or five in a row without
anything between them (improved-aesthetic-predictor, 2022). The heads that were published give about 1 to 10.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from soratrain.errors import ConfigError

KINDS = {"clip": "CLIPModel", "clip_vision_model": "CLIPVisionModelWithProjection"}  # by `model_type`
HIDDEN = (1024, 128, 64, 16)  # widths between the five layers
LAYERS = (0, 2, 4, 6, 7)  # their numbers; between them lie dropouts, which do nothing here


class Aesthetic:
    """CLIP's image side and a head on it.

    Args:
        clip: a folder as Hugging Face has it, of a CLIPModel or a CLIPVisionModelWithProjection.
        head: its state dict, .safetensors or .pth.
        device: auto, cpu, cuda or cuda:N.

    Raises:
        ConfigError: one of them is not what it should be, or they do not fit.
    """

    def __init__(self, clip: Path, head: Path, device: str) -> None:
        self.device = device_of(device)
        self.clip, self.processor = load_clip(clip)
        width = self.clip.visual_projection.out_features
        self.clip = self.clip.float().eval().to(self.device)
        self.head = head_of(read_head(head), width, head).eval().to(self.device)

    def prepare(self, picture: np.ndarray) -> np.ndarray:
        """Return RGB `[H, W, 3]` as CLIP's own processor makes it: scaled, cropped to its middle, normalised."""
        found = self.processor(images=picture, return_tensors="pt", input_data_format="channels_last")
        return np.asarray(found["pixel_values"][0].numpy(), np.float32)

    @torch.inference_mode()
    def rate(self, prepared: Sequence[np.ndarray]) -> list[float]:
        """Return the score of each picture."""
        pixels = torch.from_numpy(np.stack(prepared)).to(self.device)
        try:
            embedded = self.clip.visual_projection(self.clip.vision_model(pixel_values=pixels).pooler_output)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{len(prepared)} pictures at once do not fit on {self.device}; lower score.batch"
            ) from error
        return list(self.head(nn.functional.normalize(embedded, dim=-1)).squeeze(-1).tolist())


def device_of(name: str) -> torch.device:
    """Return the device that `score.device` names. Raises ConfigError where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"score.device={name} is not there; use auto, cpu or cuda") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"score.device={name}: there are {torch.cuda.device_count()} CUDA devices here; use auto")
    return device


def load_clip(folder: Path) -> tuple[Any, Any]:
    """Return the network in a folder, and its image processor. Raises ConfigError where it is no whole CLIP."""
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"score.clip={folder}: is no folder with a readable config.json ({error})") from error
    if kind not in KINDS:
        raise ConfigError(
            f"score.clip={folder}: holds a {kind}; it takes a CLIPModel or a CLIPVisionModelWithProjection"
        )
    try:
        import transformers

        transformers.logging.set_verbosity_error()  # it tells of text weights that nobody asked for
        transformers.logging.disable_progress_bar()
        network = getattr(transformers, KINDS[kind])
        images = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor  # before 5
    except ImportError as error:
        raise ConfigError(f"score.clip needs transformers ({error}): pip install 'soratrain[hf]'") from error
    try:
        processor = images.from_pretrained(folder, local_files_only=True)
        clip, told = network.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ConfigError(f"score.clip={folder}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error
    missing = sorted(name for name in told["missing_keys"] if not name.startswith(("text_", "logit_")))
    if missing:  # they would be drawn at random
        raise ConfigError(f"score.clip={folder}: lacks {len(missing)} weights, {missing[0]} among them")
    return clip, processor


def read_head(file: Path) -> dict[str, Tensor]:
    """Return the tensors in a file. Raises ConfigError where it is none of tensors alone."""
    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the bytes lead it to
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise ConfigError(f"score.aesthetic={file}: cannot be read as a state dict: {what[0]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ConfigError(f"score.aesthetic={file}: holds no state dict but a {type(found).__name__}")
    return dict(found)


def head_of(state: Mapping[str, Tensor], width: int, file: Path) -> nn.Sequential:
    """Return the head with the weights `state`, for embeddings of `width`; raises ConfigError where it is another."""
    single = set(state) == {"weight", "bias"}
    names = ("",) if single else tuple(f"layers.{number}." for number in LAYERS)
    widths = (width, 1) if single else (width, *HIDDEN, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, before, after in zip(names, widths[:-1], widths[1:], strict=True):
        shapes |= {f"{name}weight": (after, before), f"{name}bias": (after,)}
    found = {name: tuple(value.shape) for name, value in state.items()}
    if found != shapes:
        wrong = [name for name in sorted(found.keys() | shapes.keys()) if found.get(name) != shapes.get(name)]
        listed = ", ".join(f"{name} {found.get(name, 'missing')}, not {shapes.get(name, 'there')}" for name in wrong)
        raise ConfigError(
            f"score.aesthetic={file}: does not fit score.clip, whose embeddings are {width} wide, as one linear layer "
            f"(weight, bias) or as {len(LAYERS)} (layers.0.weight …): {listed}"
        )
    head = nn.Sequential(*(nn.Linear(*ends) for ends in zip(widths[:-1], widths[1:], strict=True)))
    for layer, name in zip(head, names, strict=True):
        layer.load_state_dict({part: state[name + part].float() for part in ("weight", "bias")})
    return head
