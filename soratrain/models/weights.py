"""Weights on disk: one safetensors file a network, and beside it the YAML that rebuilds the network."""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError, DataError
from soratrain.optim import shape_of

ALLOWED = "soratrain."  # a weights folder may name classes of this package only: reading one never runs foreign code


def spec_of(factory: partial) -> dict[str, Any]:
    """Return `{target, kwargs}` of a network's factory, plain values only; a factory of a factory counts as one."""
    kwargs: dict[str, Any] = {}
    target: Any = factory
    while isinstance(target, partial):
        kwargs, target = {**target.keywords, **kwargs}, target.func
    return {"target": f"{target.__module__}.{target.__qualname__}", "kwargs": kwargs}


def factory_of(spec: Mapping[str, Any]) -> partial:
    """Return the factory that `spec_of` described.

    Raises:
        ConfigError: the target is not a class of this package.
    """
    target = str(spec.get("target", ""))
    if not target.startswith(ALLOWED):
        raise ConfigError(f"weights name the class {target!r}; only classes of soratrain are loaded")
    module_name, _, class_name = target.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"weights name {target!r}, which does not exist: {error}") from error
    return partial(cls, **spec.get("kwargs", {}))


def resolve(folder: str | Path, name: str) -> Path:
    """Return the folder that holds `name`'s weights: `folder` itself, or the `weights/` of a stage's output.

    Raises:
        DataError: neither holds them.
    """
    for candidate in (Path(folder) / "weights", Path(folder)):
        if (candidate / f"{name}.safetensors").is_file() and (candidate / f"{name}.yaml").is_file():
            return candidate
    raise DataError(f"no weights of {name!r} in {folder} (looked for {name}.safetensors and {name}.yaml)")


def save(
    folder: str | Path, name: str, module: nn.Module | Mapping[str, Tensor], factory: partial, extra: Mapping[str, Any]
) -> None:
    """Write `name.safetensors` and `name.yaml` into `folder`.

    Args:
        module: the network, or its state dict.
        factory: what built it; its plain keyword arguments are stored.
        extra: plain values kept beside the weights (what they were trained on, say).

    Raises:
        DataError: they cannot be written.
    """
    folder = Path(folder)
    state = module.state_dict() if isinstance(module, nn.Module) else module
    tensors = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in state.items()}
    document = yaml.safe_dump({**spec_of(factory), "extra": dict(extra)}, sort_keys=False, allow_unicode=True)
    try:
        with replacing(folder / f"{name}.safetensors") as path:
            path.touch()
            mode = path.stat().st_mode
            save_file(tensors, str(path))
            path.chmod(mode)  # safetensors lets nobody else read it
        with replacing(folder / f"{name}.yaml") as path:
            path.write_text(document, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise DataError(f"weights {folder / name}.safetensors were not written ({error}); free space there") from error


def load_state(folder: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the YAML document of `name`.

    Raises:
        DataError: they are not there, or damaged.
    """
    document, path = document_of(folder, name), resolve(folder, name) / f"{name}.safetensors"
    try:
        return load_file(str(path)), document
    except (OSError, ValueError, SafetensorError) as error:
        raise _unreadable(path, error) from error


def document_of(folder: str | Path, name: str) -> dict[str, Any]:
    """Return the YAML document beside the weights of network `name`: what rebuilds it, and what it is.

    Raises:
        DataError: they are not there, or it is damaged.
    """
    path = resolve(folder, name) / f"{name}.yaml"
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise ValueError(f"it holds a {type(document).__name__}, not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise _unreadable(path, error) from error
    return document


def _unreadable(path: Path, error: Exception) -> DataError:
    reason = " ".join(str(error).split())
    return DataError(f"weights {path} cannot be read ({reason}); copy or train them again")


def load_into(
    module: nn.Module,
    state: Mapping[str, Tensor],
    origin: str,
    write: Callable[[Tensor, Tensor], None] | None = None,
) -> None:
    """Load `state` into `module`, every key and shape matching, one tensor after the other.

    Args:
        write: called with each parameter or buffer and its whole values, where a process may hold only a slice of it.

    Raises:
        DataError: keys are missing, unexpected or of another shape; the message names them.
    """
    own = module.state_dict(keep_vars=True)
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    common = {key: state[key].shape for key in own.keys() & state.keys()}
    reshaped = sorted(key for key, shape in common.items() if shape_of(own[key]) != shape)
    if missing or unexpected or reshaped:
        raise DataError(
            f"weights of {origin} do not fit {type(module).__name__}: missing {missing[:5]}, unexpected"
            f" {unexpected[:5]}, of another shape {reshaped[:5]}; use the config they were trained with"
        )
    with torch.no_grad():
        for key, tensor in own.items():
            if write:
                write(tensor, state[key])
            else:
                tensor.copy_(state[key])


def digest(module: nn.Module, *, without: str | None = None) -> str:
    """Return the SHA-256, in hex, of a network's names, types and numbers: the same wherever they were read from.

    Args:
        without: what does not count: names that begin so.
    """
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        if without and name.startswith(without):
            continue
        tensor = tensor.detach().cpu().contiguous()
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        found.update(memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))
    return found.hexdigest()


def load(folder: str | Path, name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, dict[str, Any]]:
    """Return the network `name` rebuilt from `folder`, in eval mode, and the extra values stored beside it."""
    state, document = load_state(folder, name)
    module = factory_of(document)()
    load_into(module, state, f"{folder}:{name}")
    return module.to(device).eval(), document.get("extra", {})
