"""What a stage needs from others: is it there, and if not, which command makes it."""

from __future__ import annotations

import json
import logging
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from soratrain import outputs
from soratrain.children import run_child
from soratrain.compose import split_override
from soratrain.errors import DataError
from soratrain.rules import FROZEN_TEXT, PUBLISHED
from soratrain.schema import groups

log = logging.getLogger(__name__)

WORLD = "data/world"  # where the embedded world lies by default
HELD = {"shards": "a complete dataset.json", "latents": "a complete dataset.json", "captions": "captions/*/*.parquet"}
MAKERS = {"captions": "recaption", "vae": "vae", "captioner": "captioner", "latents": "encode", "dit": "dit"}
NETS_OF_ALL = ("vae", "captioner", "dit", "text", "lpips", "engine")
PASSED_ON = ("run", "seed", "machine", "upstream", "inputs", "logger", *NETS_OF_ALL)
NETS = {"vae": ("vae",), "dit": ("vae", "captioner", "text", "objective")}  # that a stage's folder comes from
OWN_TEXT = ("captioner", "recaption")  # stages that train a text encoder of their own, beside a frozen one for the DiT
ALSO = {"latents": ("buckets",), "dit": ("buckets", "objective", "latents")}  # buckets: of cached latents


def holds(key: str, place: str) -> bool:
    """Return whether `place` holds a whole upstream result of kind `key`; of a URL the reader itself will tell."""
    if "://" in place:
        return True
    path = Path(place)
    if key == "captions":
        return any(any(path.glob(pattern)) for pattern in ("captions/*/*.parquet", "*.parquet", "*/*.parquet"))
    if key in ("shards", "latents"):
        file = path / "dataset.json"
        return file.is_file() and json.loads(file.read_text()).get("complete", True)
    files = (f"{key}.safetensors", f"{key}.safetensors.index.json")
    return any((folder / file).is_file() for folder in (path / "weights", path) for file in files)


def ready(key: str, place: str) -> bool:
    """Return whether upstream `key` can be used: it is there, and a stage whose folder it is has finished."""
    path = Path(place)
    finished = not (path / "config.yaml").is_file() or (path / "result.json").is_file()
    return holds(key, place) and finished


def is_videos(place: str) -> bool:
    """Return whether `place` is a plain folder of videos, which a stage with `videos: true` takes for shards."""
    from soratrain.stages.clips import is_videos  # brings the decoders in, which other stages do not need here

    return is_videos(place)


def check_current(place: str) -> None:
    """Refuse an upstream folder that was made from something that has been made anew since, at any depth.

    Raises:
        DataError: names both folders and the command that makes the older one again.
    """
    path = Path(place)
    for key, origin in outputs.stored_upstream(path).items():
        if outputs.fingerprint(origin["path"]) != origin["fingerprint"]:
            old = outputs.stored_config(path) or {}
            stage = old.get("stage", {}).get("name", "?")
            raise DataError(
                f"{path} was made from {outputs.called(key)}={origin['path']}, which has been made anew since; make it"
                f" again: python -m soratrain stage={stage}{of_experiment(path)} run={old.get('run')} fresh=true"
            )
        check_current(origin["path"])


def command(key: str, place: str, config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the command that makes upstream `key` of this run at `place`."""
    if key == "shards":
        clips = config["machine"]["world"]["clips"]
        return [
            sys.executable,
            "-m",
            "data_prep",
            "input=world",
            f"output={place}",
            f"world.clips={clips}",
        ]
    groups_passed = PASSED_ON + ALSO.get(key, ())
    if MAKERS[key] in OWN_TEXT and is_frozen(config):
        groups_passed = tuple(group for group in groups_passed if group != "text")
    passed = [item for item in overrides if split_override(item)[0].split(".")[0] in groups_passed]
    passed = [item for item in passed if split_override(item)[0] != f"inputs.{key}" and item != "upstream=fail"]
    passed += of_experiment(Path(place)).split()
    return [sys.executable, "-m", "soratrain", f"stage={MAKERS[key]}", *passed]


def of_experiment(place: Path) -> str:
    """Return the word, after a space, that makes a folder named after an experiment; nothing for others."""
    return f" +experiment={place.name}" if place.name in groups().get("experiment", []) else ""


def shown(words: Sequence[str]) -> str:
    """Return a command as one would type it."""
    return " ".join(["python", *(shlex.quote(word) for word in words[1:])])


def needed(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (kind, place) of every upstream result of a stage; of shards, captions, latents there may be several.

    A dry stage looks at clips alone, whatever the one that it plans needs.
    """
    found, stage = [], config["stage"]
    for key in ["shards"] if stage.get("dry") else stage["needs"]:
        places = config["inputs"][key]
        found += [(key, place) for place in (places if isinstance(places, list) else [places]) if place is not None]
    return found


def ensure(config: Mapping[str, Any], overrides: Sequence[str]) -> None:
    """See that everything `stage.needs` is there and current; what is missing is made, or named with its command.

    Raises:
        DataError: something is missing and may not, or could not, be made; or it is out of date.
    """
    given = {split_override(item)[0] for item in overrides}
    for key, place in needed(config):
        if key == "vae" and published(place, config):
            continue
        if not (ready(key, place) or (key == "shards" and config["stage"].get("videos") and is_videos(place))):
            make(key, place, config, overrides, own=f"inputs.{key}" not in given)
        check_current(place)
        check_nets(place, config, given)
    begin_from(config, overrides, given)


def begin_from(config: Mapping[str, Any], overrides: Sequence[str], given: set[str]) -> None:
    """See that what an experiment continues is there (its own `init`; one given by hand is looked at when it is read).

    Raises:
        DataError: it is missing and may not, or could not, be made; or it is out of date.
    """
    place, stage = begun_from(config), config["stage"].get("name")
    if place is None or "init" in given:
        return
    if not ready(stage, place):
        make(stage, place, config, overrides, own=True, called="init")
    check_current(place)
    check_nets(place, config, given)


def begun_from(config: Mapping[str, Any]) -> str | None:
    """Return the folder whose weights a run begins with; jobs, which train nothing, pass an experiment's over."""
    return (config.get("init") or None) if config["stage"].get("kind") == "fit" else None


def published(place: str, config: Mapping[str, Any]) -> bool:
    """Return whether the VAE is another's, which no stage makes; whether it is the one asked for is seen here.

    Raises:
        DataError: it is another than `vae=` says, or is not there.
    """
    from soratrain.models.autoencoders import check, find

    asked = config.get("vae", {})
    if not asked.get("_target_", "").startswith(PUBLISHED) and find(place) is None:
        return False
    check(place, asked)
    return True


def check_nets(place: str, config: Mapping[str, Any], given: set[str]) -> None:
    """Refuse an upstream folder that was made with another net than the one asked for on the command line.

    Raises:
        DataError: names the net and the two ways out.
    """
    old = outputs.stored_config(Path(place)) or {}
    stage = old.get("stage", {}).get("name")
    for net in NETS.get(stage, ("vae", "captioner", "text")):
        asked = any(key == net or key.startswith(net + ".") for key in given)
        if net == "text" and stage in ("encode", *OWN_TEXT) and is_frozen(config):
            continue  # latents say themselves what they hold, and features are made live where they hold none
        if asked and net in old and made_by(old[net]) != made_by(config[net]):
            raise DataError(
                f"{net}: {place} was made with another one than you ask for; give run=NAME for a run beside it, or"
                f" leave {net}= out"
            )


def is_frozen(config: Mapping[str, Any]) -> bool:
    """Return whether the text encoder asked for is a frozen one."""
    return str(config.get("text", {}).get("_target_")).startswith(FROZEN_TEXT)


def made_by(net: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a net's config says of what it makes; whence a frozen text encoder's features come is none of it."""
    return {key: value for key, value in net.items() if key != "features"}


def lacks(key: str, place: str, config: Mapping[str, Any], overrides: Sequence[str]) -> str:
    """Return what is wrong with a path that was given by hand, and the mend."""
    if key == "shards" and is_videos(place):
        name = Path(place).resolve().name
        words = [sys.executable, "-m", "data_prep", f"input={place}", f"output=data/{name}"]
        return f"these are videos; make shards of them: {shown(words)}, and give those"
    if key == "shards":
        words = [sys.executable, "-m", "data_prep", "input=VIDEOS", f"output={place}"]
    else:
        words = command_at(key, place, config, overrides)
    mend = f"give another path, or make it: {shown(words)}" if words else "give another path"
    return f"holds no finished {key} ({HELD.get(key, f'weights/{key}.safetensors')}); {mend}"


def command_at(key: str, place: str, config: Mapping[str, Any], overrides: Sequence[str]) -> list[str]:
    """Return the command whose own folder `place` is, of this run or another; none where no command makes it.

    Another run has inputs of its own, and is named by the place.
    """
    *above, run, stage, name = Path(place).parts if len(Path(place).parts) > 3 else ("",) * 4
    named = name == "base" or of_experiment(Path(place))
    if above != ["outputs"] or stage != MAKERS[key] or not named:
        return []
    words = command(key, place, config, overrides)
    if run == config["run"]:
        return words
    kept = [item for item in words[4:] if not item.startswith(("run=", "inputs."))]
    return [*words[:4], *([f"run={run}"] if run != "default" else []), *kept]


def make(
    key: str, place: str, config: Mapping[str, Any], overrides: Sequence[str], *, own: bool, called: str = ""
) -> None:
    """Make what is missing with the command that anyone would type.

    Args:
        own: the place is this run's own, and was not given on the command line.
        called: the config key of the place; by default that of the input.

    Raises:
        DataError: it may not be made, or could not be.
    """
    called = called or f"inputs.{key}"
    if not own and not (key == "shards" and place == WORLD):
        raise DataError(f"{called}={place}: {lacks(key, place, config, overrides)}")
    words = command(key, place, config, overrides)
    if config["upstream"] == "fail":
        raise DataError(f"{called}={place}: missing or unfinished; make it first: {shown(words)}")
    log.info("%s=%s is missing: making it with  %s", called, place, shown(words))
    code = run_child(words)
    if code or not ready(key, place):
        raise DataError(f"{called}={place}: could not be made (exit code {code}); run it alone: {shown(words)}")
