"""A net of Hugging Face as a part of ours: frozen, with low-rank adapters (LoRA), or trained whole.

What is trained is part of the net that a tower stands in; what is frozen is not: no optimizer, average, checkpoint or
export knows it, no strategy cuts it up, every rank holds it whole, and it is read when it is first needed. Of it the
weights keep the folder and a digest, by which another's is refused.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from soratrain.errors import ConfigError, DataError
from soratrain.models.hf_files import Place, samples, transformers
from soratrain.models.hf_text import DTYPES
from soratrain.optim import shape_of

TUNINGS = ("frozen", "lora", "full")
WHOLE: ContextVar[bool] = ContextVar("whole", default=False)


@contextmanager
def built_whole() -> Iterator[None]:
    """Let nobody cut up what is built inside the block: others' nets initialize their blocks when all of them stand."""
    token = WHOLE.set(True)
    try:
        yield
    finally:
        WHOLE.reset(token)


class LoRA(nn.Module):
    """What is added to a frozen layer: a product of two thin matrices, nothing at first (Hu et al., 2022).

    Args:
        inputs, outputs: widths of the layer.
        rank: of the product.
        alpha: the product counts `alpha / rank` times.
    """

    def __init__(self, inputs: int, outputs: int, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs, bias=False)
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down.weight, a=math.sqrt(5))
        nn.init.zeros_(self.up.weight)
        self.down.weight.no_muon = self.up.weight.no_muon = True  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return self.up(self.down(x.to(self.down.weight.dtype))) * self.scale


def layer_widths(layer: nn.Module) -> tuple[int, int] | None:
    """Return the input's and the output's width of a linear layer of any make; None for what is none.

    Nor is one whose matrix its parent takes without calling it.
    """
    if isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    if type(layer).__name__ == "Conv1D":  # GPT-2's, whose matrix lies the other way round
        inputs, outputs = shape_of(layer.weight)  # type: ignore[arg-type]
        return inputs, outputs
    return None


def leave_out(net: nn.Module) -> None:
    """Tell Muon which of a net's parameters are no matrices: rows of a table, places, tokens, and the output head."""
    layers = {module.weight for module in net.modules() if isinstance(module, nn.modules.conv._ConvNd)}
    layers |= {module.weight for module in net.modules() if layer_widths(module)}  # type: ignore[misc]
    head = getattr(net, "get_output_embeddings", lambda: None)()
    for param in net.parameters():
        if param.ndim > 1 and (param not in layers or (head is not None and param is head.weight)):
            param.no_muon = True  # type: ignore[attr-defined]


class Tower(nn.Module):
    """Somebody else's net.

    Args:
        key: of the config, that names its place; others of its keys begin so.
        called: what it is, in words.
        folder: as `save_pretrained` wrote it, or an id on the hub (OWNER/NAME).
        tuning: `frozen`, `lora` or `full`.
        dtype: of what is frozen, `fp32` or `bf16`; what is trained is fp32.
        rank, alpha, targets: of the adapters, and the last parts of the names of the layers that get one.

    Attributes:
        config: its own.

    Raises:
        ConfigError: transformers is not installed, or a value does not fit the net.
        DataError: its config cannot be read.
    """

    digest: Tensor
    outer = ""  # before the names of tensors in some files

    def __init__(
        self,
        *,
        key: str,
        called: str,
        folder: str,
        tuning: str,
        dtype: str,
        rank: int,
        alpha: float,
        targets: Sequence[str],
    ) -> None:
        super().__init__()
        if tuning not in TUNINGS:
            raise ConfigError(f"{key}_tuning={tuning!r} is unknown; use {', '.join(TUNINGS)}")
        if dtype not in DTYPES:
            raise ConfigError(f"captioner.dtype={dtype!r} is unknown; use {' or '.join(DTYPES)}")
        self.library = transformers("captioner=vlm")
        self.place = Place(str(folder), key=key, what=called)
        self.key, self.called, self.tuning, self.dtype = key, called, tuning, dtype
        with self.place.reading():
            self.reader, self.config = self.form(self.place.config())
        self.register_buffer("digest", torch.zeros(32, dtype=torch.uint8))
        self._held: list[Any] = []  # what is frozen: in a list it is none of this net's modules
        if tuning == "full":
            with built_whole():
                self.net = self.built()
            leave_out(self.net)
            self.tied = self.net.state_dict().keys() - dict(self.net.named_parameters()).keys()
            self.tied -= {name for name, _ in self.net.named_buffers()}
            self.register_state_dict_post_hook(_without_tied)
            self.net.eval()
        self.adapters = nn.ModuleDict()
        if tuning == "lora":
            with built_whole(), torch.device("meta"):
                layers = {name: layer_widths(layer) for name, layer in self.built().named_modules()}
            linear = {name: widths for name, widths in layers.items() if widths is not None}
            chosen = [name for name in linear if name.rsplit(".", 1)[-1] in set(targets)]
            if rank < 1 or not chosen:
                known = sorted({name.rsplit(".", 1)[-1] for name in linear})
                raise ConfigError(
                    f"captioner.lora_rank={rank} captioner.lora_targets={list(targets)}: no layer of {folder} gets an"
                    f" adapter; its linear layers are called {', '.join(known)}, and a rank is at least 1"
                )
            for name in chosen:
                self.adapters[name.replace(".", "/")] = LoRA(*linear[name], rank=rank, alpha=alpha)

    def form(self, stored: Mapping[str, Any]) -> tuple[Any, Any]:
        """Return the class that reads the net and its config, by its `config.json`."""
        raise NotImplementedError

    def counts(self, name: str) -> bool:
        """Return whether a stored tensor is used, however it was saved."""
        return True

    def marks(self) -> str:
        """Return what else the digest is of."""
        return ""

    def built(self) -> Any:
        """Return the net with random weights, fp32."""
        make = getattr(self.reader, "from_config", None) or self.reader._from_config
        return make(self.config, dtype=torch.float32)

    def frozen_bytes(self) -> int:
        """Return the bytes of what is frozen, which every rank holds whole: counted by its config, nothing is read."""
        if self.tuning == "full":
            return 0
        with built_whole(), torch.device("meta"):
            net = self.built()
        weights = sum(shape_of(param).numel() for param in net.parameters())  # what goes by two names counts once
        return weights * DTYPES[self.dtype].itemsize + sum(buffer.nbytes for buffer in net.buffers())

    def train(self, mode: bool = True) -> Tower:
        """Others' nets never drop anything out: what is random here depends on a sample's key alone."""
        super().train(mode)
        if self.tuning == "full":
            self.net.eval()
        return self

    def here(self) -> Any:
        """Return the net, on the device that this tower is on; what is frozen is read when it is first asked for.

        Raises:
            DataError: it cannot be read, or is another than the weights were trained with.
        """
        if self.tuning == "full":
            return self.net
        if not self._held:
            net = self.stored(DTYPES[self.dtype]).requires_grad_(False)
            self.bind()
            layers = dict(net.named_modules())
            for name, adapter in self.adapters.items():
                layers[name.replace("/", ".")].register_forward_hook(_adding(adapter))
            self._held = [net, torch.device("cpu")]
        if self._held[1] != self.digest.device:
            with torch.inference_mode(False):
                self._held = [self._held[0].to(self.digest.device), self.digest.device]
        return self._held[0]

    def stored(self, dtype: torch.dtype) -> Any:
        """Return the net as it is stored, in eval mode, on the CPU.

        Raises:
            DataError: it cannot be read, or does not fit its config.
        """
        options = {"use_safetensors": self.place.safe, "weights_only": True, "dtype": dtype}
        with self.place.reading(), built_whole(), torch.inference_mode(False), torch.device("cpu"):
            net, said = self.reader.from_pretrained(
                self.place.folder, config=self.config, output_loading_info=True, **options
            )
        if wrong := said["missing_keys"] or said["mismatched_keys"]:
            named = sorted(map(str, wrong))[:3]
            raise DataError(f"{self.key}={self.place.folder}: its weights do not fit its config (missing {named})")
        return net.eval()

    def read_stored(self, write: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Let a net that is trained whole begin with its stored weights.

        Args:
            write: called with each parameter or buffer and its whole values.

        Raises:
            DataError: they cannot be read.
        """
        if self.tuning != "full":
            return
        state = self.stored(torch.float32).state_dict()
        with torch.no_grad():
            for name, tensor in self.net.state_dict(keep_vars=True).items():
                if name in self.tied:
                    continue
                if write:
                    write(tensor, state[name])
                else:
                    tensor.copy_(state[name])
        self.bind()

    def bind(self) -> None:
        """Remember the net by its digest; refuse another than the one remembered.

        Of a net that is trained whole, whose weights are ours, the digest is of its form alone.

        Raises:
            DataError: the weights were trained with another.
        """
        found = hashlib.sha256(f"{self.config.model_type} {self.marks()}".encode())
        if self.tuning != "full":
            with self.place.reading():
                rows = samples(self.place, self.counts)
            for name, shape, numbers in sorted(rows, key=lambda row: row[0].removeprefix(self.outer)):
                found.update(f"{name.removeprefix(self.outer)} {shape}".encode())
                found.update(numbers.numpy().tobytes())
        now, known = torch.tensor(list(found.digest()), dtype=torch.uint8), self.digest.cpu()
        if known.any() and not torch.equal(known, now):
            raise DataError(
                f"{self.key}={self.place.folder}: the weights were trained with another {self.called} (digest"
                f" {known.numpy().tobytes().hex()[:16]}, this one has {found.hexdigest()[:16]}); put that one back, or"
                f" write where it is into captioner.yaml beside the weights"
            )
        with torch.inference_mode(False), torch.no_grad():
            self.digest.copy_(now)

    def record(self) -> dict[str, Any]:
        """Return what stands beside the weights: which net they go with."""
        digest = self.digest.cpu().numpy().tobytes().hex()
        return {"folder": self.place.folder, "tuning": self.tuning, "digest": digest}


def _without_tied(tower: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Leave out what goes by two names: it is stored under its first."""
    for name in tower.tied:  # type: ignore[union-attr]
        state.pop(f"{prefix}net.{name}", None)


def _adding(adapter: nn.Module) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def hook(layer: nn.Module, given: tuple[Tensor, ...], answer: Tensor) -> Tensor:
        return answer + adapter(given[0]).to(answer.dtype)

    return hook
