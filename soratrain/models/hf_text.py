"""Frozen text encoders of Hugging Face: T5, UMT5, CLIP's text half, BERT and their like, from a folder or the hub.

Made, an encoder knows its files and its tokenizer; its net is read when features are first asked for, so that whoever
has stored ones never holds it. transformers is imported where it is needed; it finds what the hub has downloaded
before, and downloads unless HF_HUB_OFFLINE=1.

Legend: L tokens of one text, D width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from soratrain.errors import ConfigError, DataError
from soratrain.models.hf_files import Place, samples, transformers

# The half that reads text, of models that have another; of all others, the whole.
READERS = {
    "t5": "T5EncoderModel",
    "mt5": "MT5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
SHAPED = ("num_heads", "num_attention_heads", "feed_forward_proj", "hidden_act", "layer_norm_epsilon", "layer_norm_eps")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}  # fp16 does not hold T5's range
PROBE = "Two café owners (№ 17), 三只猫 and a ДОМ: don't stop!"  # tells tokenizers apart
TOKENS_AT_ONCE = 16384  # padding counted: what the net reads in one call


class HFText:
    """Texts in, the last hidden states of each out, without padding.

    Args:
        folder: of the encoder, as `save_pretrained` wrote it, or its id on the hub (OWNER/NAME); its tokenizer there,
            or in `tokenizer/` beside it, as in pipelines.
        dim: width D of the features; what the DiT is built for.
        max_tokens: longest text in tokens, opening and closing ones included; the rest is cut and counted.
        subfolder: of the encoder within `folder`: `text_encoder` in a pipeline's.
        dtype: in which the net computes, `fp32` or `bf16`.
        offline: take from the hub only what has been downloaded before.

    Raises:
        ConfigError: transformers is not installed, or a value does not fit the encoder.
        DataError: it cannot be read.
    """

    def __init__(
        self,
        *,
        folder: str,
        dim: int,
        max_tokens: int = 512,
        subfolder: str | None = None,
        dtype: str = "fp32",
        offline: bool = False,
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError(f"text.dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
        self.place = Place.of(folder, subfolder, offline=offline)
        self.name, self.dim, self.max_tokens, self.dtype = str(folder), dim, max_tokens, dtype
        library = transformers()
        with self.place.reading():
            kind = self.place.config()["model_type"]
            self.reader: Any = getattr(library, READERS.get(kind, "AutoModel"))
            configs: Any = getattr(self.reader, "config_class", None) or library.AutoConfig
            self.config: Any = configs.from_pretrained(self.place.folder, **self.place.within)
            tokenizer = self.place.tokenizer()
            self.tokenizer: Any = library.AutoTokenizer.from_pretrained(
                tokenizer.folder, config=self.config, trust_remote_code=False, **tokenizer.within
            )
        width, most = self.config.hidden_size, getattr(self.config, "max_position_embeddings", None)
        if width != dim:
            raise ConfigError(f"text.dim={dim}: the encoder in {folder} has the width {width}; set text.dim={width}")
        if max_tokens < 1 or (most and max_tokens > most):
            bound = f"between 1 and {most}, the most that {folder} reads" if most else "at least 1"
            raise ConfigError(f"text.max_tokens={max_tokens} must be {bound}")
        self._net: Any = None

    @cached_property
    def digest(self) -> str:
        """A SHA-256 of the encoder: its form, rows of each of its tensors, and how it cuts up texts.

        Rows, not all numbers: it is asked for wherever stored features are used, and a trained tensor changes in every
        row. Equal for one file and many, and with or without the half that does not read.
        """
        shaped = {name: getattr(self.config, name) for name in SHAPED if hasattr(self.config, name)}
        found = hashlib.sha256(f"{self.config.model_type} {shaped} {self.ids([PROBE])[0]}".encode())
        with self.place.reading():
            rows = samples(self.place)
        for name, shape, numbers in rows:
            found.update(f"{name} {shape}".encode())
            found.update(numbers.numpy().tobytes())
        return found.hexdigest()

    def identity(self) -> str:
        """Return what its features depend on: the encoder, its precision, and where texts are cut."""
        return f"hf {self.digest} {self.dtype} {self.max_tokens}"

    def record(self) -> dict[str, Any]:
        """Return what is kept beside stored features, and beside weights that were trained on them."""
        return {"kind": "hf", "folder": self.name, "digest": self.digest, "max_tokens": self.max_tokens}

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return each text's token numbers, uncut."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]  # tokenizers refuse lone surrogates
        return self.tokenizer(clean, padding=False, truncation=False, verbose=False)["input_ids"] if clean else []

    def tokenize(self, texts: Sequence[str]) -> tuple[list[list[int]], int]:
        """Return each text's token numbers, at most `max_tokens`, and how many texts were cut; closing ones stay."""
        found, longer = self.fitted(texts)
        return found, len(longer)

    def fitted(self, texts: Sequence[str]) -> tuple[list[list[int]], set[int]]:
        """Return the same, and the places of the texts that were cut."""
        found = self.ids(texts)
        longer = [place for place, ids in enumerate(found) if len(ids) > self.max_tokens]
        for place in longer:
            text = texts[place].encode("utf-8", "replace").decode()
            found[place] = self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"]
        return found, set(longer)

    def load(self, device: torch.device | str = "cpu") -> Any:
        """Return the net, on `device`; it is read when it is first asked for.

        Raises:
            DataError: its weights cannot be read or do not fit its config.
        """
        if self._net is None:
            options = {"use_safetensors": self.place.safe, "weights_only": True, "dtype": DTYPES[self.dtype]}
            with self.place.reading(), torch.inference_mode(False):
                net, said = self.reader.from_pretrained(
                    self.place.folder, **self.place.within, config=self.config, output_loading_info=True, **options
                )
            if wrong := said["missing_keys"] or said["mismatched_keys"]:  # beyond them: the half that does not read
                named = sorted(map(str, wrong))[:3]
                raise DataError(f"text.folder={self.name}: its weights do not fit its config (missing {named})")
            self._net = net.eval().requires_grad_(False)
        return self._net.to(device)

    @torch.no_grad()
    def features(self, ids: Sequence[Sequence[int]], device: torch.device | str = "cpu") -> list[Tensor]:
        """Return the features `[L, D]` of each text, fp32, on `device`."""
        net, found = self.load(device), dict[int, Tensor]()
        for some in together([len(item) for item in ids]):
            longest = max(len(ids[place]) for place in some)
            told = torch.zeros(len(some), longest, dtype=torch.int64)  # a masked token's number says nothing
            mask = torch.zeros(len(some), longest, dtype=torch.int64)
            for row, place in enumerate(some):
                told[row, : len(ids[place])] = torch.tensor(ids[place])
                mask[row, : len(ids[place])] = 1
            with torch.autocast(torch.device(device).type, enabled=False):
                states = net(input_ids=told.to(device), attention_mask=mask.to(device)).last_hidden_state
            for row, place in enumerate(some):
                found[place] = states[row, : len(ids[place])].float()
        return [
            found[place] if place in found else torch.zeros(0, self.dim, device=device) for place in range(len(ids))
        ]

    def store(self, texts: Sequence[str], device: torch.device | str = "cpu") -> tuple[list[Tensor], set[int]]:
        """Return the features `[L, D]` of each text, bf16, on the CPU, and the places of the texts that were cut."""
        ids, cut = self.fitted(texts)
        return [features.to("cpu", torch.bfloat16) for features in self.features(ids, device)], cut


def together(lengths: Sequence[int]) -> Iterable[list[int]]:
    """Yield places of texts that are read in one call, by length, so that little is padded; empty ones in none."""
    some: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if some and lengths[place] * (len(some) + 1) > TOKENS_AT_ONCE:
            yield some
            some = []
        if lengths[place]:
            some.append(place)
    if some:
        yield some
