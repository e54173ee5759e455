"""The VAE in a folder: ours, or another's that diffusers wrote; or one on the Hugging Face hub.

Another's weights are read by diffusers itself, imported where it is needed. What a folder of ours may name stays
restricted to this package (weights.py): another's is known by its `config.json`, and by its class, from a short list.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.patchify import STRIDE
from soratrain.models.published import KINDS, Published
from soratrain.models.vae import VAE

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")  # owner/name
SUBFOLDERS = ("", "vae")  # of a VAE's own folder, and of a pipeline's


def find(place: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Return subfolder and config of a VAE that diffusers wrote into the folder `place`, or None where there is none.

    Raises:
        DataError: its config cannot be read.
    """
    for subfolder in SUBFOLDERS:
        file = Path(place) / subfolder / "config.json"
        if file.is_file():
            try:
                config = json.loads(file.read_text(encoding="utf-8"))
            except ValueError as error:
                raise DataError(f"{file} is not JSON ({error}); copy the folder again") from error
            if isinstance(config, dict) and "_class_name" in config:
                return subfolder, config
    return None


def find_on_hub(place: str) -> tuple[str, dict[str, Any]]:
    """Return subfolder and config of the VAE in the hub's repository `place`.

    Raises:
        ConfigError: huggingface_hub is not installed.
        DataError: there is no such thing, or the hub cannot be reached.
    """
    hub, errors = required("huggingface_hub"), required("huggingface_hub.errors")
    required("huggingface_hub.utils").logging.set_verbosity_error()  # the error below says it all
    for subfolder in reversed(SUBFOLDERS):
        try:
            file = hub.hf_hub_download(place, f"{subfolder}/config.json".lstrip("/"))
        except errors.LocalEntryNotFoundError as error:  # not here, and the hub does not answer
            raise DataError(
                f"inputs.vae={place}: is no folder here, and the hub cannot be reached for it; download it where there"
                " is a network, and give its folder"
            ) from error
        except errors.EntryNotFoundError:
            continue
        except (OSError, ValueError, errors.HfHubHTTPError) as error:
            reason = str(error).strip().splitlines()[0]
            raise DataError(f"inputs.vae={place}: cannot be had from the hub ({reason})") from error
        return subfolder, json.loads(Path(file).read_text(encoding="utf-8"))
    raise DataError(f"inputs.vae={place}: that repository holds no VAE (no config.json there or in vae/)")


def required(package: str) -> Any:
    """Return an imported package of the extra `hf`.

    Raises:
        ConfigError: it is not installed; says how to.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ConfigError(f"other people's VAEs need {package} ({error}): pip install 'soratrain[hf]'") from error


def describe(place: str | Path) -> tuple[str, type[Published], dict[str, Any]]:
    """Return subfolder, class and config of the published VAE at `place`, a folder or an id on the hub.

    Raises:
        DataError: there is none, or one of a class that is not known here.
    """
    found = find(place)
    if found is None:
        if Path(place).exists() or not HUB_ID.fullmatch(str(place)):
            raise DataError(
                f"inputs.vae={place}: holds no VAE that diffusers wrote (config.json with _class_name, there or in"
                " vae/); give such a folder, or an id on the hub (OWNER/NAME)"
            )
        found = find_on_hub(str(place))
    subfolder, config = found
    name = str(config.get("_class_name"))
    kind = next((kind for kind in KINDS if kind.class_name == name), None)
    if kind is None:
        raise DataError(
            f"inputs.vae={place}: holds weights of {name}; known are {' and '.join(kind.class_name for kind in KINDS)}"
        )
    return subfolder, kind, config


def check(place: str, asked: Mapping[str, Any]) -> None:
    """See that the weights at `place` are of the VAE that the config asks for.

    Args:
        asked: the config's node `vae`.

    Raises:
        DataError: they are of another class, have another number of channels, or are not there.
    """
    _, kind, config = describe(place)
    wanted = next((known for known in KINDS if asked["_target_"].endswith(f".{known.__name__}")), None)
    if wanted is not kind:
        said = f"vae={wanted.option} is {wanted.class_name}" if wanted else "the config asks for a VAE of ours"
        raise DataError(f"inputs.vae={place}: holds weights of {kind.class_name}, and {said}; say vae={kind.option}")
    channels = kind.channels_in(config)
    if channels != asked["latent_channels"]:
        raise DataError(
            f"inputs.vae={place}: its latents have {channels} channels, and vae.latent_channels is"
            f" {asked['latent_channels']}; say vae.latent_channels={channels}"
        )


def stride_at(place: str | Path) -> tuple[int, int, int]:
    """Return the stride of the VAE in a folder from its config alone; the usual one where there is none (yet).

    Raises:
        ConfigError, DataError: its config cannot be read, or is of no VAE.
    """
    if find(place) is not None:
        _, kind, config = describe(place)
        return kind.stride_in(config)
    try:
        document = weights.document_of(place, "vae")
    except DataError:
        return STRIDE
    with torch.device("meta"):
        return tuple(weights.factory_of(document)().stride)  # type: ignore[return-value]


def outline(place: str | Path) -> tuple[tuple[int, int, int], int]:
    """Return the stride of the VAE at `place` and how many numbers its weights are, from its config alone.

    Raises:
        ConfigError: what reads it is not installed.
        DataError: there is none, or its config cannot be read.
    """
    if find(place) is not None or not (Path(place).exists() or not HUB_ID.fullmatch(str(place))):
        _, kind, config = describe(place)
        with torch.device("meta"):
            net = getattr(required("diffusers"), kind.class_name).from_config(config)
        stride = kind.stride_in(config)
    else:
        with torch.device("meta"):
            net = weights.factory_of(weights.document_of(place, "vae"))()
        stride = tuple(net.stride)  # type: ignore[assignment, arg-type]
    return stride, sum(parameter.numel() for parameter in net.parameters())


def load_vae(place: str | Path, device: torch.device | str = "cpu") -> VAE:
    """Return the VAE at `place`, ours or another's, in eval mode.

    Raises:
        ConfigError: what reads it is not installed, or it is no VAE.
        DataError: there is none, or its weights do not fit its config.
    """
    if find(place) is None and (Path(place).exists() or not HUB_ID.fullmatch(str(place))):
        module, _ = weights.load(place, "vae", device)
        if not isinstance(module, VAE):
            raise ConfigError(f"inputs.vae={place}: holds a {type(module).__name__}; give a VAE's folder")
        return module
    subfolder, kind, _ = describe(place)
    cls = getattr(required("diffusers"), kind.class_name)
    try:
        net, said = cls.from_pretrained(
            str(place),
            subfolder=subfolder or None,
            use_safetensors=True,  # never a pickle
            low_cpu_mem_usage=False,
            torch_dtype=torch.float32,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"inputs.vae={place}: diffusers cannot load it ({reason[:300]})") from error
    wrong = {name: sorted(map(str, said[name]))[:3] for name in ("missing_keys", "unexpected_keys") if said[name]}
    if wrong or said["mismatched_keys"]:
        raise DataError(f"inputs.vae={place}: its weights do not fit its config ({wrong or said['mismatched_keys']})")
    return kind(net).to(device).eval().requires_grad_(False)
