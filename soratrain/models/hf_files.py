"""Where the files of somebody else's model are, in a folder or on the hub, and what their tensors hold."""

from __future__ import annotations

import importlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from soratrain.errors import ConfigError, DataError
from soratrain.models.autoencoders import HUB_ID

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
# Names of tensors that do not read text, and of one that is another's double, saved or not as its writer liked.
ASIDE = ("decoder.", "lm_head.", "vision_model.", "visual_projection.", "text_projection.", "logit_scale")
DOUBLE = "encoder.embed_tokens.weight"
OUTER = "text_model."  # before names in older files


def transformers(asked: str = "text=hf") -> Any:
    """Return the library, quiet; `asked` is what needs it.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(f"{asked} needs transformers ({error}): pip install 'soratrain[hf]'") from error
    library.utils.logging.disable_progress_bar()
    library.utils.logging.set_verbosity_error()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # the errors below say it all
    return library


@dataclass(frozen=True)
class Place:
    """A folder of files, here or on the hub.

    Args:
        folder: a path, or OWNER/NAME on the hub.
        subfolder: within the hub's.
        offline: take from the hub only what has been downloaded before.
        key: of the config that names it, for messages.
        what: it is to hold.
    """

    folder: str
    subfolder: str | None = None
    offline: bool = False
    key: str = "text.folder"
    what: str = "text encoder"

    @classmethod
    def of(cls, folder: str, subfolder: str | None = None, *, offline: bool = False) -> Place:
        """Return a place; a subfolder of a folder here is a folder here."""
        if subfolder and Path(folder).is_dir():
            return cls(str(Path(folder, subfolder)))
        return cls(str(folder), subfolder, offline)

    @property
    def local(self) -> bool:
        """Whether it is a folder here."""
        return Path(self.folder).is_dir()

    @property
    def within(self) -> dict[str, Any]:
        """What `from_pretrained` takes beside the folder."""
        found: dict[str, Any] = {"subfolder": self.subfolder} if self.subfolder else {}
        return {**found, "local_files_only": True} if self.offline else found

    @property
    def safe(self) -> bool:
        """Whether its weights are safetensors; others are unpickled with nothing but tensors allowed."""
        return self._weights().name.startswith(WEIGHTS[0])

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Turn whatever reading it raises into one line that names the key and the mend.

        Raises:
            DataError: it cannot be read.
        """
        try:
            yield
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, ImportError) as error:
            reason = " ".join(str(error).split())[:200]
            if self.local:
                raise DataError(
                    f"{self.key}={self.folder}: holds no {self.what} that can be read ({reason})"
                ) from error
            if not HUB_ID.fullmatch(self.folder):
                raise DataError(
                    f"{self.key}={self.folder}: is no folder; give one that save_pretrained wrote, or an id on the hub"
                    " (OWNER/NAME)"
                ) from error
            raise DataError(
                f"{self.key}={self.folder}: is no folder here, and cannot be had from the hub ({reason}); download it"
                " where there is a network, and give its folder"
            ) from error

    def file(self, name: str, *, must: bool = False) -> Path | None:
        """Return the path of a file of this place, downloaded if need be; None where there is none.

        Args:
            must: it says why the hub cannot be reached. Else a file that is not here then counts as none: whoever has
                downloaded a repository before has all of it.

        Raises:
            OSError: the hub cannot be reached, or refuses.
        """
        if self.local:
            path = Path(self.folder, name)
            return path if path.is_file() else None
        if not HUB_ID.fullmatch(self.folder):
            raise OSError("no such folder")
        quietly = {"missing_entries": False, "connection_errors": must}
        flags = {f"_raise_exceptions_for_{name}": value for name, value in quietly.items()}
        found = transformers().utils.cached_file(self.folder, name, **self.within, **flags)
        return None if found is None else Path(found)

    def config(self) -> dict[str, Any]:
        """Return its `config.json`.

        Raises:
            OSError, ValueError: there is none that can be read.
        """
        file = self.file("config.json", must=True)
        if file is None:
            raise OSError("it has no config.json")
        return json.loads(file.read_text(encoding="utf-8"))

    def tokenizer(self) -> Place:
        """Return where its tokenizer is: there, or in `tokenizer/` beside it (`tokenizer_2/` of `text_encoder_2/`)."""
        if any(self.file(name) for name in ("tokenizer.json", "tokenizer_config.json")):
            return self
        if self.subfolder:
            return Place(self.folder, self.subfolder.replace("text_encoder", "tokenizer"), self.offline)
        here = Path(self.folder).resolve()
        beside = [here.with_name(here.name.replace("text_encoder", "tokenizer")), here.with_name("tokenizer")]
        return next((Place(str(path)) for path in beside if path != here and path.is_dir()), self)

    def _weights(self) -> Path:
        for name in WEIGHTS:
            if (file := self.file(name)) is not None:
                return file
        raise OSError(f"it has none of {', '.join(WEIGHTS)}")

    def weights(self) -> list[Path]:
        """Return the files that hold its tensors.

        Raises:
            OSError: one is missing.
        """
        first = self._weights()
        if first.suffix != ".json":
            return [first]
        names = sorted(set(json.loads(first.read_text(encoding="utf-8"))["weight_map"].values()))
        files = [(name, self.file(name)) for name in names]
        if lacking := [name for name, file in files if file is None]:
            raise OSError(f"it lacks {lacking[0]}")
        return [file for _, file in files if file is not None]


def reads_text(name: str) -> bool:
    """Return whether a tensor belongs to the half of a model that reads text."""
    return not name.startswith(ASIDE) and name != DOUBLE and not name.endswith(".position_ids")


def samples(place: Place, wanted: Callable[[str], bool] = reads_text) -> list[tuple[str, tuple[int, ...], Tensor]]:
    """Return name, shape, and the first, middle and last row as fp32, of every tensor that is `wanted`, by name."""
    found = []
    for file in place.weights():
        if file.suffix == ".safetensors":
            with safe_open(str(file), "pt") as opened:
                for name in filter(wanted, opened.keys()):
                    part = opened.get_slice(name)
                    shape = tuple(part.get_shape())
                    found.append((name.removeprefix(OUTER), shape, _rows(part, shape)))
        else:
            for name, tensor in torch.load(file, map_location="cpu", weights_only=True, mmap=True).items():
                if wanted(name):
                    shape = tuple(tensor.shape)
                    found.append((name.removeprefix(OUTER), shape, _rows(tensor, shape)))
    return sorted(found, key=lambda item: item[0])


def _rows(part: Any, shape: tuple[int, ...]) -> Tensor:
    if not shape:
        return torch.as_tensor(part[...]).float().reshape(1)
    if len(shape) == 1 or not shape[0]:
        return part[:].float().contiguous()
    rows = sorted({0, shape[0] // 2, shape[0] - 1})
    return torch.cat([part[row : row + 1].float().reshape(-1) for row in rows])
