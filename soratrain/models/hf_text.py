"""Frozen text encoders of Hugging Face, from a local folder: T5, UMT5, CLIP's text half, BERT and their like.

Their features are made once, by stage=encode. transformers is imported where it is needed.

Legend: L tokens of one text, D width.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models import weights

log = logging.getLogger(__name__)
# The half that reads text, of models that have another; of all others, the whole.
READERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}


class HFText(nn.Module):
    """Texts in, the last hidden states of each out, without padding.

    Args:
        folder: of the encoder, as `save_pretrained` wrote it; its tokenizer there, or in `tokenizer/` beside it, as in
            pipelines.
        dim: width D of the features; what the DiT is built for.
        max_tokens: longest text in tokens, closing one included; the rest is cut and counted.

    Raises:
        ConfigError: transformers is not installed, or the encoder has another width.
        DataError: the folder cannot be read.
    """

    net: Any

    def __init__(self, *, folder: str, dim: int, max_tokens: int = 512) -> None:
        super().__init__()
        try:
            import transformers
        except ImportError as error:
            raise ConfigError(f"text=hf needs transformers ({error}): pip install 'soratrain[hf]'") from error
        transformers.utils.logging.disable_progress_bar()
        beside = Path(folder).parent / "tokenizer"
        own = any((Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json"))
        try:
            kind = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["model_type"]
            reader = getattr(transformers, READERS.get(kind, "AutoModel"))
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(str(folder if own else beside))
            loading = {"use_safetensors": True, "dtype": torch.float32, "output_loading_info": True}
            self.net, said = reader.from_pretrained(str(folder), **loading)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"text.folder={folder}: holds no text encoder that can be read ({reason})") from error
        if said["missing_keys"] or said["mismatched_keys"]:  # what it has beyond is the half that does not read
            wrong = sorted(map(str, said["missing_keys"] or said["mismatched_keys"]))[:3]
            raise DataError(f"text.folder={folder}: its weights do not fit its config (missing {wrong})")
        width = self.net.config.hidden_size
        if width != dim:
            raise ConfigError(f"text.dim={dim}: the encoder in {folder} has the width {width}; set text.dim={width}")
        self.dim, self.max_tokens = dim, max_tokens
        self.eval().requires_grad_(False)

    def identity(self) -> str:
        """Return what its features depend on: the weights, and where texts are cut."""
        return f"hf {weights.digest(self)} {self.max_tokens}"

    @torch.no_grad()
    def store(self, texts: Sequence[str]) -> list[Tensor]:
        """Return the features `[L, D]` of each text, bf16, on the CPU; fp16 would not hold T5's range."""
        device = next(self.net.parameters()).device
        told = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(device)
        with torch.autocast(device.type, enabled=False):
            found = self.net(input_ids=told["input_ids"], attention_mask=told["attention_mask"]).last_hidden_state
        kept = zip(found, told["attention_mask"].bool(), strict=True)
        return [features[mask].to("cpu", torch.bfloat16) for features, mask in kept]
