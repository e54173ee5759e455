"""Weights on disk: one safetensors file a network, and beside it the YAML that rebuilds the network.

A network that is larger than one file should be lies in several, as Hugging Face does it: `NAME-00001-of-00003.
safetensors` and so on, with `NAME.safetensors.index.json` to say which tensor is where.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from soratrain.data.atomic import replacing
from soratrain.errors import ConfigError, DataError
from soratrain.models import tensor_file
from soratrain.models.tensor_file import Form, Layout
from soratrain.optim import shape_of

LARGEST = 5_000_000_000  # bytes of a file
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
        if is_in(candidate, name) and (candidate / f"{name}.yaml").is_file():
            return candidate
    raise DataError(f"no weights of {name!r} in {folder} (looked for {name}.safetensors and {name}.yaml)")


def is_in(folder: Path, name: str) -> bool:
    """Return whether tensors of `name` lie in `folder` itself, in one file or in several."""
    return any((folder / file).is_file() for file in (f"{name}.safetensors", index_of(name)))


def index_of(name: str) -> str:
    """Return the file that says in which others the tensors of `name` are."""
    return f"{name}.safetensors.index.json"


def files(folder: str | Path, name: str) -> list[Path]:
    """Return the files that hold the tensors of `name`, in order.

    Raises:
        DataError: they are not there, or their index is damaged.
    """
    place = resolve(folder, name)
    if (place / f"{name}.safetensors").is_file():
        return [place / f"{name}.safetensors"]
    index = place / index_of(name)
    try:
        found = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise _unreadable(index, error) from error
    if any(Path(file).name != file for file in found):
        raise DataError(f"weights {index} name files outside their folder; copy or train them again")
    return [place / file for file in found]


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
    state = module.state_dict() if isinstance(module, nn.Module) else module
    forms = {key: Form.of(tensor) for key, tensor in state.items()}
    tensors = ((key, state[key]) for key in tensor_file.in_order(forms))
    write(folder, name, forms, tensors, factory, extra)


def write(
    folder: str | Path,
    name: str,
    forms: Mapping[str, Form],
    tensors: Iterable[tuple[str, Tensor]],
    factory: partial,
    extra: Mapping[str, Any],
    *,
    largest: int = LARGEST,
) -> None:
    """Write tensors that come one at a time, and `name.yaml`, into `folder`; nothing is kept of them in memory.

    Args:
        forms: types and shapes of all.
        tensors: each with its name, in the order of `tensor_file.in_order(forms)`.
        factory, extra: as `save` takes them.
        largest: bytes of tensors in a file; what is more goes to several.

    Raises:
        DataError: they cannot be written.
    """
    folder, coming = Path(folder), iter(tensors)
    shards = tensor_file.shards(forms, largest)
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [f"{name}-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    document = yaml.safe_dump({**spec_of(factory), "extra": dict(extra)}, sort_keys=False, allow_unicode=True)
    try:
        for file, shard in zip(names, shards, strict=True):
            layout = Layout.of({key: forms[key] for key in shard})
            with replacing(folder / file) as path:
                tensor_file.write(path, layout.header, (_raw(next(coming), key) for key in layout.starts))
        if len(shards) > 1:
            places = {key: file for file, shard in zip(names, shards, strict=True) for key in shard}
            total = sum(form.nbytes for form in forms.values())
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
            with replacing(folder / index_of(name)) as path:
                path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        with replacing(folder / f"{name}.yaml") as path:
            path.write_text(document, encoding="utf-8")
        _remove_others(folder, name, names)
    except OSError as error:
        raise DataError(f"weights {folder / names[0]} were not written ({error}); free space there") from error


def _raw(coming: tuple[str, Tensor], expected: str) -> memoryview:
    name, tensor = coming
    assert name == expected, f"{name} comes where {expected} belongs"
    return tensor_file.raw(tensor)


def _remove_others(folder: Path, name: str, names: list[str]) -> None:
    """Remove what an earlier writing of `name` has left that was spread over another number of files."""
    old = {*folder.glob(f"{name}-?????-of-?????.safetensors"), folder / f"{name}.safetensors"}
    for path in old | ({folder / index_of(name)} if len(names) == 1 else set()):
        if path.name not in names:
            path.unlink(missing_ok=True)


def load_state(folder: str | Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the state dict and the YAML document of `name`.

    Raises:
        DataError: they are not there, or damaged.
    """
    document, state = document_of(folder, name), dict[str, Tensor]()
    for path in files(folder, name):
        try:
            state |= load_file(str(path))
        except (OSError, ValueError, SafetensorError) as error:
            raise _unreadable(path, error) from error
    return state, document


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
    """Return the network `name` rebuilt from `folder`, in eval mode, and the extra values stored beside it.

    Raises:
        DataError: it is not there, is damaged, or is made of others' nets that are not where they were.
    """
    state, document = load_state(folder, name)
    try:
        module = factory_of(document)()
    except DataError as error:
        place = resolve(folder, name) / f"{name}.yaml"
        raise DataError(f"{error}; {place} names it: write there where it is now") from error
    load_into(module, state, f"{folder}:{name}")
    return module.to(device).eval(), document.get("extra", {})
