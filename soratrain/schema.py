"""What a config may hold: root keys, and each group's keys and kinds; rules.py has the rules across groups.

Keys are checked at every level: against the signature of the class that a `_target_` names, or, in a group of plain
values, against the keys and types that the group's own YAML files show. So a new option is declared in one place.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from soratrain.errors import ConfigError
from soratrain.kinds import fits, in_words

CONF = Path(__file__).resolve().parent.parent / "conf"
SPECIAL = {"_target_", "_partial_", "_convert_", "_recursive_"}


@dataclass(frozen=True)
class Root:
    """The keys of a run. Those without a default are groups, whose options stand in `conf/<group>/`."""

    stage: dict
    machine: dict
    vae: dict
    dit: dict
    captioner: dict
    text: dict
    objective: dict
    sampler: dict
    task: dict
    expand: dict
    engine: dict
    data: dict
    buckets: dict
    conditioning: dict
    optimizer: dict
    schedule: dict
    strategy: dict
    validation: dict
    trainer: dict
    lpips: dict
    logger: dict
    inputs: dict
    parallel: dict
    fvd: dict
    out: str
    seed: int = 0
    run: str = "default"
    fresh: bool = False
    init: str | None = None
    upstream: str = "make"
    target: str | None = None
    latents: str = "cached"
    prompt: str | list | None = None
    size: str | None = None
    frames: int | None = None
    fps: float | None = None
    prompts_file: str | None = None
    samples: int = 1
    requeues: int = 100


KINDS = {"size": "WIDTHxHEIGHT, such as 64x48"}
SEEDS = 2**32
# what others interpolate is checked first, so that it is blamed: these groups, the root's own values, the trainer
SOURCES = ("machine", "inputs", "parallel", "validation")
OF_THE_ROOT = ("inputs", "parallel", "fvd")  # plain groups of the root's own file
OPEN = ("stage.devices",)  # what stands there has names of the user's own; who reads it checks it
ROOT_KEYS = tuple(field.name for field in fields(Root))


def groups() -> dict[str, list[str]]:
    """Return the options of every config group, by listing `conf/`."""
    found = {}
    for folder in sorted(path for path in CONF.iterdir() if path.is_dir() and path.name not in ("hydra", "data_prep")):
        found[folder.name] = sorted(file.stem for file in folder.glob("*.yaml"))
    return found


def launchers() -> list[str]:
    """Return the options of `hydra/launcher`: how the jobs of a sweep are started."""
    return ["basic", "submitit_local", *(file.stem for file in CONF.glob("hydra/launcher/*.yaml"))]


def suggest(word: str, known: Iterable[str]) -> str:
    """Return a sentence that names the closest known words, or all of them."""
    options = sorted(str(item) for item in known if item not in SPECIAL)
    close = difflib.get_close_matches(word, options, n=1, cutoff=0.5)
    initials = "".join(part[:1] for part in word.split("_"))  # learning_rate is lr
    close = close or [item for item in options if "_" in word and item == initials]
    return (f"did you mean {close[0]!r}? " if close else "") + f"known: {', '.join(options)}"


def locate(target: str) -> Any:
    """Return the object that a `_target_` names.

    Raises:
        ConfigError: there is none.
    """
    module_name, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"_target_={target}: cannot be imported ({error}); name a class of an installed module"
        ) from error


def check_target(path: str, node: Mapping[str, Any]) -> None:
    """Check a node with a `_target_` against the target's signature."""
    target = locate(str(node["_target_"]))
    parameters = inspect.signature(target).parameters
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except (NameError, TypeError):
        hints = {}
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    for key, value in node.items():
        if key in SPECIAL:
            continue
        if key not in parameters:
            if not takes_any:
                raise ConfigError(f"{path}.{key}={value!r}: no such key; {suggest(key, parameters)}")
        elif not fits(value, hints.get(key, Any)):
            raise ConfigError(f"{path}.{key}={value!r}: must be {in_words(hints[key])}")
    if not node.get("_partial_"):
        for name, parameter in parameters.items():
            required = parameter.default is inspect.Parameter.empty
            if required and name not in node and parameter.kind is inspect.Parameter.KEYWORD_ONLY:
                raise ConfigError(f"{path}.{name}: missing; {target.__name__} needs it")


@cache
def examples(group: str) -> dict[str, list[Any]]:
    """Return, by dotted key, the values that a group's own YAML files give it."""
    seen: dict[str, list[Any]] = {}

    def walk(prefix: str, node: Any) -> None:
        seen.setdefault(prefix, []).append(node)
        if isinstance(node, Mapping):
            for key, value in node.items():
                walk(f"{prefix}.{key}", value)

    files = [CONF / "config.yaml"] if group in OF_THE_ROOT else sorted((CONF / group).rglob("*.yaml"))
    for file in files:
        text = file.read_text()
        document = yaml.safe_load(text) or {}
        if group in OF_THE_ROOT or "@package _global_" in text:
            document = document.get(group, {})
        walk(group, {key: value for key, value in document.items() if key != "defaults"})
    return seen


def same_kind(value: Any, example: Any) -> bool:
    """Return whether `value` is of the kind that an example shows; null and interpolations show nothing."""
    if value is None or example is None or (isinstance(example, str) and "${" in example):
        return True
    if isinstance(example, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(example, bool)
    if isinstance(example, int | float):
        # YAML reads 1e-4 as a string where a float is meant; Hydra's own grammar does not
        return isinstance(value, int | float)
    if isinstance(example, Mapping):
        return isinstance(value, Mapping)
    return isinstance(value, type(example)) or isinstance(example, str)


def check_plain(path: str, node: Mapping[str, Any], known: Mapping[str, list[Any]]) -> None:
    """Check a group of plain values against its YAML files' keys and kinds."""
    for key, value in node.items():
        name = f"{path}.{key}"
        if name not in known:
            siblings = [item[len(path) + 1 :] for item in known if item.startswith(path + ".")]
            raise ConfigError(f"{name}={value!r}: no such key; {suggest(key, (s for s in siblings if '.' not in s))}")
        if name in OPEN and isinstance(value, Mapping):
            continue
        if not any(same_kind(value, example) for example in known[name]):
            raise ConfigError(f"{name}={value!r}: must be like {known[name][0]!r}")
        if isinstance(value, Mapping) and any(isinstance(example, Mapping) and example for example in known[name]):
            check_node(name, value, known)


def check_node(path: str, node: Mapping[str, Any], known: Mapping[str, list[Any]]) -> None:
    """Check one node and all below it."""
    if "_target_" in node:
        check_target(path, node)
        for key, value in node.items():
            if isinstance(value, Mapping) and "_target_" in value:
                check_node(f"{path}.{key}", value, known)
    else:
        check_plain(path, node, known)


def check_keys(config: Mapping[str, Any]) -> None:
    """Refuse a config with an unknown key, or a value of the wrong kind, at any level.

    Raises:
        ConfigError: names the key, its value, and the closest known key.
    """
    hints = typing.get_type_hints(Root)

    def turn(key: str) -> tuple[bool, bool, bool]:
        return key not in SOURCES, hints.get(key) is dict, key != "trainer"

    for key in sorted(config, key=turn):
        value = config[key]
        if key not in ROOT_KEYS:
            raise ConfigError(f"{key}={value!r}: no such key; {suggest(key, ROOT_KEYS)}")
        if hints[key] is dict:
            if not isinstance(value, Mapping):
                raise ConfigError(f"{key}={value!r}: is a group; {suggest(str(value), groups().get(key, []))}")
            check_node(key, value, examples(key))
        elif not fits(value, hints[key]):
            raise ConfigError(f"{key}={value!r}: must be {KINDS.get(key) or in_words(hints[key])}")
