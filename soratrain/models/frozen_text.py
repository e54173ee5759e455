"""A frozen text encoder as the DiT sees it: features that stage=encode has stored, or made live; and a learned null.

The encoder itself is none of this net's modules: no optimizer, average, checkpoint or export knows it, and no strategy
cuts it up. What is trained, and kept, is the null: the token that stands for an empty prompt and for a dropped caption,
which a frozen encoder cannot learn. Beside it lies the encoder's digest, so that weights refuse another encoder.

Legend: L tokens of all texts, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models.attention import Packing
from soratrain.models.autoencoders import HUB_ID
from soratrain.models.hf_text import HFText
from soratrain.models.text import ByteTextEncoder

log = logging.getLogger(__name__)

FEATURES = ("auto", "stored", "live")


@dataclass(frozen=True)
class FrozenTokens:
    """Texts on their way through `FrozenText`.

    Attributes:
        distinct: of each distinct text its token numbers, or its stored features `[L, D]`.
        places: of each text its number in `distinct`; -1 is the null.
        truncated: how many texts were cut at the longest length; of stored ones stage=encode has said it.
    """

    distinct: tuple[list[int] | Tensor, ...]
    places: tuple[int, ...]
    truncated: int
    lengths: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        own = tuple(1 if place < 0 else len(self.distinct[place]) for place in self.places)
        object.__setattr__(self, "lengths", own)

    def __len__(self) -> int:
        return len(self.places)


class FrozenText(nn.Module):
    """Texts in, the features of a frozen encoder out, `null` for empty ones; every text's graph holds the null.

    Args:
        folder, dim, max_tokens, subfolder, dtype: see `HFText`.
        features: whence training takes those of captions: `stored`, from the latents; `live`, from the encoder at every
            step; `auto`, stored where they are and live where not. Whatever is stored must be of this encoder.

    Raises:
        ConfigError: `features` is none of these.
    """

    encoder_digest: Tensor

    def __init__(
        self,
        *,
        folder: str,
        dim: int,
        max_tokens: int = 512,
        subfolder: str | None = None,
        dtype: str = "fp32",
        features: str = "auto",
    ) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ConfigError(f"text.features={features!r} is unknown; use {', '.join(FEATURES)}")
        self.folder, self.dim, self.max_tokens, self.mode = str(folder), dim, max_tokens, features
        self.options: dict[str, Any] = {
            "folder": folder,
            "dim": dim,
            "max_tokens": max_tokens,
            "subfolder": subfolder,
            "dtype": dtype,
        }
        self.null = nn.Parameter(torch.randn(1, dim) * 0.02)
        self.null.no_muon = True  # type: ignore[attr-defined]
        self.register_buffer("encoder_digest", torch.zeros(32, dtype=torch.uint8))
        self._encoder: HFText | None = None
        self._found = ""  # the digest of the encoder that is here
        self._reads_stored = features != "live"
        self._mixed: bool | None = None  # whether captions are read live among stored ones; None: none are stored

    def encoder(self) -> HFText:
        """Return the frozen encoder, whose net is not read yet.

        Raises:
            ConfigError, DataError: it cannot be read, or it is another than the weights were trained with.
        """
        if self._encoder is None:
            encoder = HFText(**self.options)
            self._bind(encoder.digest)
            self._encoder = encoder
        return self._encoder

    def _bind(self, digest: str) -> None:
        """Remember the encoder by its digest; refuse another than the one remembered."""
        self._found = digest
        now, known = torch.tensor(list(bytes.fromhex(digest)), dtype=torch.uint8), self.encoder_digest.cpu()
        if known.any() and not torch.equal(known, now):
            raise DataError(
                f"text.folder={self.folder}: the weights were trained with another text encoder (digest"
                f" {known.numpy().tobytes().hex()[:16]}, this one has {digest[:16]}); give the folder of that one"
            )
        with torch.inference_mode(False), torch.no_grad():
            self.encoder_digest.copy_(now)

    def confirm(self) -> None:
        """See that the encoder is still the one that these weights, loaded since, go with.

        Raises:
            DataError: they were trained with another.
        """
        if self._found:
            self._bind(self._found)

    def record(self) -> dict[str, Any]:
        """Return what stands beside the weights: which encoder they go with."""
        digest = self.encoder_digest.cpu().numpy().tobytes().hex()
        return {"kind": "hf", "folder": self.folder, "digest": digest, "max_tokens": self.max_tokens}

    def begin(self, held: Mapping[str, Mapping[str, Any] | None]) -> str:
        """See, before training, that the encoder is there and stored features are its own; return whence they come.

        Args:
            held: of each folder of latents, what text it says it holds (`HFText.record`), or None. None at all where
                latents are made live.

        Raises:
            ConfigError, DataError: names the folder and the mend.
        """
        stored = self._stored(held)
        lacking = self.lacking(held)
        if self.mode == "stored" and lacking:
            raise DataError(
                f"text.features=stored: {lacking[0]} holds no features of a frozen text encoder; make it again: python"
                " -m soratrain stage=encode with the same text=, fresh=true; or say text.features=live"
            )
        for place, record in stored.items():
            self._check(place, record, trusted=not lacking)
        if lacking:
            self.encoder().load(self.null.device)
        self._reads_stored = bool(stored)
        self._mixed = bool(lacking) if stored else None
        whence = "live, by" if not stored else "stored and live, of" if lacking else "stored, of"
        return f"text features of captions: {whence} {self.folder}"

    def _stored(self, held: Mapping[str, Mapping[str, Any] | None]) -> dict[str, dict[str, Any]]:
        found = {place: dict(record) for place, record in held.items() if record and record.get("kind") == "hf"}
        return {} if self.mode == "live" else found

    def lacking(self, held: Mapping[str, Mapping[str, Any] | None]) -> list[str]:
        """Return the folders, of `held` as `begin` takes it, whose captions the encoder will read at every step."""
        stored = self._stored(held)
        return [place for place in held if place not in stored] if held else ["clips"]

    def _check(self, place: str, record: Mapping[str, Any], *, trusted: bool) -> None:
        """Refuse stored features of another encoder; one on the hub that is not here is known by its name alone."""
        wanted: dict[str, Any] = {"max_tokens": self.max_tokens}
        try:
            wanted["digest"] = HFText(**self.options, offline=trusted).digest if trusted else self.encoder().digest
        except DataError:
            if record.get("folder") != self.folder or not HUB_ID.fullmatch(self.folder):
                raise
            log.info("%s is not here; features of that name in %s are taken for its own", self.folder, place)
            wanted["digest"] = record["digest"]
        if wrong := [name for name, value in wanted.items() if record.get(name) != value]:
            raise DataError(
                f"{place} holds text features of another encoder (its {' and '.join(wrong)} differ:"
                f" {record.get('folder')}, cut at {record.get('max_tokens')} tokens) than text.folder={self.folder}"
                f" text.max_tokens={self.max_tokens}; give that encoder, encode again (stage=encode fresh=true), or say"
                " text.features=live"
            )
        self._bind(wanted["digest"])

    def tokenize(self, texts: Sequence[str], stored: Sequence[Tensor | None] | None = None) -> FrozenTokens:
        """Return texts by their tokens; by what is stored of them, where it is given and to be used.

        Raises:
            DataError: a text is not stored and must be, or what is stored is of another width.
        """
        held = list(stored) if stored and self._reads_stored else [None] * len(texts)
        numbers: dict[str, int] = {}
        distinct: list[list[int] | Tensor] = []
        unread: list[str] = []
        for text, features in zip(texts, held, strict=True):
            if not text.strip() or text in numbers:
                continue
            numbers[text] = len(distinct)
            if features is not None and features.is_floating_point():  # numbers are tokens of `byte`
                distinct.append(self._fitting(features))
            else:
                unread.append(text)
                distinct.append([])
        truncated = 0
        if unread:
            if stored is not None:
                self._not_stored(unread)
            ids, truncated = self.encoder().tokenize(unread)
            for text, found in zip(unread, ids, strict=True):
                distinct[numbers[text]] = found
        places = [numbers.get(text, -1) for text in texts]
        empty = {
            place for place in places if place >= 0 and not len(distinct[place])
        }  # a text of no tokens says nothing
        return FrozenTokens(tuple(distinct), tuple(-1 if place in empty else place for place in places), truncated)

    def _fitting(self, features: Tensor) -> Tensor:
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise DataError(
                f"text.dim={self.dim}: the stored text features are of shape {tuple(features.shape)}; encode again with"
                " the same text=, or give the encoder that they are of"
            )
        return features

    def _not_stored(self, texts: Sequence[str]) -> None:
        """Say once that captions are read live among stored ones, or refuse to."""
        if self.mode == "stored":
            raise DataError(
                f"text.features=stored: the caption {texts[0][:60]!r} has no features beside its latent; store those of"
                " captions made later too: stage=encode stage.job.captions=FOLDER, or say text.features=auto"
            )
        if self._mixed is False:
            log.warning(
                "some captions have no features beside their latents, %r for one: they are read live, by %s",
                texts[0][:60],
                self.folder,
            )
            self._mixed = True

    def forward(self, tokens: FrozenTokens) -> tuple[Tensor, Packing]:
        """Return the features of all texts `[L, D]` and how they are packed, each distinct text read once."""
        device = self.null.device
        numbers = [place for place, item in enumerate(tokens.distinct) if isinstance(item, list) and item]
        read: dict[int, Tensor] = {}
        if numbers:
            ids = [item for place in numbers if isinstance(item := tokens.distinct[place], list)]
            read = dict(zip(numbers, self.encoder().features(ids, device), strict=True))
        parts = [read.get(place, item) for place, item in enumerate(tokens.distinct)]
        rows = [part.to(device, self.null.dtype) for part in parts if isinstance(part, Tensor)]
        sizes = [len(part) if isinstance(part, Tensor) else 0 for part in parts]
        starts = [0, *accumulate([1, *sizes])]  # of the null and each distinct text in one table
        table = torch.cat([self.null, *rows])
        spans = [torch.arange(starts[place + 1], starts[place + 2]) for place in tokens.places]
        return table.index_select(0, torch.cat(spans).to(device)), Packing(tokens.lengths)


TextEncoder = ByteTextEncoder | FrozenText
