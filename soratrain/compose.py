"""From command-line overrides to one resolved, plain config; Hydra's errors become one line each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from soratrain.errors import ConfigError
from soratrain.schema import CONF, OPEN, ROOT_KEYS, groups, launchers, suggest

TEXT_KEYS = (
    "prompt",
    "input",
    "output",
    "inputs.*",
    "init",
    "out",
    "lpips.vgg",
    "lpips.lin",
    "fvd.i3d",
    "prompts_file",
    "expand.folder",
    "expand.url",
    "expand.model",
    "expand.instruction",
    "task.image",
    "task.video",
    "task.video2",
    "task.mask",
    "validation.prompts",
    "validation.latents",
    "captioner.vision",
    "captioner.language",
    "stage.job.folder",
    "stage.job.prompts.*",
    "engine.folder",
    "engine.url",
    "engine.model",
)  # values that may hold any text
LIST_KEYS = (
    "inputs.shards",
    "inputs.latents",
    "inputs.captions",
    "validation.prompts",
)  # of these, those that may be [a, b]


def split_override(override: str) -> tuple[str, str]:
    """Return the key without `+`, `++` or `~`, and the value as written."""
    key, _, value = override.partition("=")
    return key.lstrip("+~"), value


def check_overrides(overrides: Sequence[str]) -> None:
    """Refuse a word that is no override, an unknown group option, and an unknown root key, naming the closest.

    Raises:
        ConfigError: names the override and the mend.
    """
    known = groups()
    for override in overrides:
        key, value = split_override(override)
        if "=" not in override and not override.startswith("~"):
            raise ConfigError(f"{override!r}: is not an override; write key=value, such as stage=vae")
        try:
            OverridesParser.create().parse_override(override)
        except HydraException as error:
            reason = str(error).splitlines()[0]
            raise ConfigError(f"{override!r}: cannot be read ({reason}); quote the value: key='\"…\"'") from error
        if key == "hydra/launcher" and value not in launchers():
            raise ConfigError(f"{key}={value}: no such option; {suggest(value, launchers())}")
        if key in known and key != "hydra":
            options = [*known[key], *(["auto"] if key == "machine" else [])]
            for choice in re.split(r"[,\[\]\s]+", value):
                if choice and choice != "null" and choice not in options:
                    raise ConfigError(f"{key}={choice}: no such option; {suggest(choice, options)}")
            if key == "experiment" and value in ("", "null"):
                raise ConfigError(f"experiment={value}: leave it out where there is none")
            if key == "experiment" and not override.startswith("+"):
                raise ConfigError(f"experiment={value}: write +experiment={value}, since no experiment is the default")
        root = key.split(".")[0].split("@")[0].split("/")[0]
        if root not in (*ROOT_KEYS, "hydra", "experiment"):
            raise ConfigError(f"{key}={value}: no such key; {suggest(root, ROOT_KEYS)}")


def aim(overrides: Sequence[str]) -> list[str]:
    """Return `overrides` with the stage's file chosen by `target=` where a stage has a file for each target.

    Raises:
        ConfigError: there is no such target.
    """
    given = dict(split_override(item) for item in overrides)
    stage, target = given.get("stage", ""), given.get("target")
    files = {file.stem for file in (CONF / "stage" / stage).glob("*.yaml")} if stage else set()
    if not files or target is None:
        return list(overrides)
    usual = str(yaml.safe_load((CONF / "stage" / f"{stage}.yaml").read_text())["target"])
    if target not in (usual, *files):
        raise ConfigError(f"target={target}: stage={stage} has no such target; {suggest(target, (usual, *files))}")
    chosen = stage if target == usual else f"{stage}/{target}"
    return [f"stage={chosen}" if split_override(item)[0] == "stage" else item for item in overrides]


def one_line(error: Exception) -> str:
    """Return the first telling line of a Hydra or OmegaConf error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def unknown_key(error: Exception, overrides: Sequence[str]) -> str | None:
    """Return a sentence for Hydra's «could not override», with the closest key of that group; None for others."""
    match = re.search(r"Could not (?:override|append to config) '?([\w.@/-]+)'?", str(error))
    if not match:
        return None
    key = match.group(1).rstrip(".")
    parent, _, leaf = key.rpartition(".")
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            base = hydra_compose("config", [item for item in overrides if split_override(item)[0] != key])
        node = OmegaConf.select(base, parent) if parent else base
    except (HydraException, OmegaConfBaseException):
        return None
    said = f"{key}: no such key; {suggest(leaf, node)}" if OmegaConf.is_dict(node) else f"{key}: no such key"
    return f"{said}; a new one begins with a plus: '+{key}={{like:…}}'" if parent in OPEN else said


def compose(overrides: Sequence[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Compose and resolve the config of `overrides`.

    Returns:
        The config as plain Python values, and the option chosen for each group.

    Raises:
        ConfigError: an override, a group option or a key that does not exist, or a value that cannot be resolved.
    """
    check_overrides(overrides)
    if not any(split_override(item)[0] == "stage" for item in overrides):
        raise ConfigError(f"stage is missing; {suggest('', groups()['stage'])}")
    overrides = aim(overrides)
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            composed = hydra_compose("config", overrides, return_hydra_config=True)
        choices = {key: value for key, value in composed.hydra.runtime.choices.items() if value is not None}
        OmegaConf.set_struct(composed, False)
        composed.pop("hydra")
        given = [value for key, value in map(split_override, overrides) if key == "experiment" and folder_name(value)]
        experiment = choices.get("experiment") or next(iter(given[-1:]), None)  # Hydra names no choice of several
        if experiment and not any(split_override(item)[0] == "out" for item in overrides):
            base = Path(composed.out).name
            name = folder_name(experiment) if base == "base" else f"{base}-{folder_name(experiment)}"
            composed.out = f"outputs/{composed.run}/{composed.stage.name}/{name}"
        composed.run = str(composed.run)  # run=2024 is a name too
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise ConfigError(f"{missing[0]}: has no value; give {missing[0]}=…")
        config = OmegaConf.to_container(composed, resolve=True)
    except yaml.YAMLError as error:
        raise ConfigError(f"a file in {CONF} is not valid YAML: {one_line(error)}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(unknown_key(error, overrides) or one_line(error)) from error
    assert isinstance(config, dict)
    return {str(key): value for key, value in config.items()}, {str(key): str(value) for key, value in choices.items()}


def launcher_node(overrides: Sequence[str]) -> dict[str, Any]:
    """Return what `hydra.launcher` resolves to for the overrides of a single run.

    Raises:
        ConfigError: a key that does not exist.
    """
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            node = hydra_compose("config", aim(overrides), return_hydra_config=True).hydra.launcher
        return {str(key): value for key, value in OmegaConf.to_container(node, resolve=True).items()}  # type: ignore[union-attr]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(launcher_key(error, overrides) or one_line(error)) from error


def launcher_key(error: Exception, overrides: Sequence[str]) -> str | None:
    """Return a sentence for a key that the launcher does not have, with the closest one; None for other errors."""
    match = re.search(r"Could not override 'hydra\.launcher\.([\w.-]+)'", str(error))
    if not match:
        return None
    (chosen,) = [split_override(item)[1] for item in overrides if split_override(item)[0] == "hydra/launcher"][-1:]
    file = CONF / "hydra" / "launcher" / f"{chosen}.yaml"
    known = yaml.safe_load(file.read_text()) if file.is_file() else {}
    return f"hydra.launcher.{match.group(1)}: no such key; {suggest(match.group(1), known)}"


def folder_name(experiment: str) -> str:
    """Return the folder of an experiment, or of several: `[a,b]` becomes `a+b`."""
    return "+".join(part for part in re.split(r"[,\[\]\s'\"]+", experiment) if part not in ("", "null"))
