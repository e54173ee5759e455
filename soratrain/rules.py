"""The rules of a config across its keys and groups. What breaks one is refused before anything is built."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from soratrain.distributed.mesh import check_heads
from soratrain.errors import ConfigError
from soratrain.schema import SEEDS, check_keys, locate

PUBLISHED = "soratrain.models.published."  # VAEs that others have trained
FROZEN_TEXT = "soratrain.models.frozen_text."
ZERO = ("zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")
AIMED = ("evaluate", "plan")  # stages that have targets
SHARES_CLIPS = ("dit", "sample", "encode", "plan target=dit")  # stages in which processes can share a clip


def check_latents(config: Mapping[str, Any]) -> None:
    """Refuse latents made live where no stage takes them, or where they cannot be what is asked.

    Raises:
        ConfigError: names the mend.
    """
    if config.get("latents") != "live":
        return
    if not (config["stage"]["name"] == "dit" or (config["stage"]["name"] == "plan" and config["target"] == "dit")):
        raise ConfigError("latents=live: only stage=dit trains on latents; leave it out")
    if config["data"].get("batching") == "pack":
        raise ConfigError(
            "data.batching=pack with latents=live: clips are encoded in batches of one size; use data.batching=bucket,"
            " or latents=cached"
        )


def check_parallel(config: Mapping[str, Any]) -> None:
    """Refuse clips shared where none can be, by one process, or by so many that heads cannot be dealt out.

    Raises:
        ConfigError: names the mend.
    """
    sequence, stage = config["parallel"].get("sequence"), config["stage"]
    if type(sequence) is not int or sequence < 1:
        raise ConfigError(f"parallel.sequence={sequence}: must be a whole number of at least 1")
    if sequence == 1:
        return
    said = stage["name"] + (f" target={config['target']}" if stage["name"] in AIMED else "")
    if said not in SHARES_CLIPS:
        stages = ", ".join(f"stage={name}" for name in SHARES_CLIPS)
        raise ConfigError(
            f"parallel.sequence={sequence}: processes share clips in {stages}, and not in stage={said}; leave it out"
        )
    if stage["name"] == "encode" and str(config["vae"].get("_target_")).startswith(PUBLISHED):
        raise ConfigError(
            f"parallel.sequence={sequence} with vae={config['vae']['_target_'].removeprefix(PUBLISHED).lower()}: its"
            " pictures cannot be cut up, since each number depends on the whole; leave it out: processes then share the"
            " shards"
        )
    if stage["kind"] == "fit" and config["strategy"].get("name") == "single":
        raise ConfigError(
            f"parallel.sequence={sequence} with strategy=single: tokens are shared by several processes; use"
            " strategy=ddp, zero1, zero2 or zero3"
        )
    if "dit" in (stage.get("module") or {}) or stage["name"] == "plan":
        check_heads(sequence, config["dit"]["num_heads"], "dit.num_heads")


def check_across(config: Mapping[str, Any]) -> None:
    """Refuse combinations that cannot work, before anything is built.

    Raises:
        ConfigError: names the keys, their values and the mend.
    """
    if config["upstream"] not in ("make", "fail"):
        raise ConfigError(f"upstream={config['upstream']!r}: must be make or fail")
    if config["target"] is not None and config["stage"]["name"] not in AIMED:
        stages = " and ".join(f"stage={name}" for name in AIMED)
        raise ConfigError(f"target={config['target']}: only {stages} have one; leave it out")
    if config.get("expand") and config["stage"]["name"] != "sample":
        raise ConfigError(f"expand: stage={config['stage']['name']} draws no prompts, stage=sample does; leave it out")
    if not re.fullmatch(r"[\w.-]+", config["run"]) or config["run"].startswith("."):
        raise ConfigError(f"run={config['run']!r}: must be a folder name of letters, digits, '_', '-' and '.'")
    if not config["out"].strip():
        raise ConfigError("out is empty: it names the folder of what a stage makes; leave it out, or give out=FOLDER")
    if not 0 <= config["seed"] < SEEDS:
        raise ConfigError(f"seed={config['seed']}: must lie between 0 and {SEEDS - 1}")
    if config["optimizer"].get("name") == "muon" and config["strategy"].get("name") in ZERO:
        raise ConfigError(
            f"optimizer=muon with strategy={config['strategy']['name']}: ZeRO flattens gradients, which Muon needs as"
            " matrices; use optimizer=adamw, or strategy=ddp"
        )
    if config["optimizer"].get("clip_adaptive") and config["strategy"].get("name") in ZERO:
        raise ConfigError(
            f"optimizer.clip_adaptive={config['optimizer']['clip_adaptive']} with strategy="
            f"{config['strategy']['name']}: DeepSpeed's engine clips by itself, to optimizer.clip; set"
            " optimizer.clip_adaptive=0, or use strategy=ddp"
        )
    stage, vae = config["stage"], config["vae"]
    if (stage.get("module") or {}).get("adversary") and config["strategy"].get("name") in ZERO:
        raise ConfigError(
            f"strategy={config['strategy']['name']}: DeepSpeed takes one optimizer, and a discriminator needs its own;"
            " use strategy=ddp"
        )
    trains = stage["name"] == "vae" or (stage["name"] == "plan" and stage["job"].get("target") == "vae")
    if trains and str(vae.get("_target_")).startswith(PUBLISHED):
        raise ConfigError(
            f"vae={vae['_target_'].removeprefix(PUBLISHED).lower()} is a VAE that others have trained, and stage=vae"
            " trains one of ours; go on with stage=encode, or use vae=tiny, s or base"
        )
    if str(config["text"].get("_target_")).startswith(FROZEN_TEXT):
        check_frozen_text(config)
    if "objective" in (stage.get("module") or {}):  # what is drawn with, weights say
        from soratrain.diffusion.sampler import check_fits

        check_fits(config["sampler"].get("name", "auto"), locate(config["objective"]["_target_"]).name)
    if config["trainer"].get("compile") == "blocks":
        if stage["name"] != "dit":
            raise ConfigError(f"trainer.compile=blocks: those of the DiT are meant, and stage={stage['name']} has none")
        if config["dit"].get("recompute") == "selective":
            raise ConfigError(
                "trainer.compile=blocks with dit.recompute=selective: the compiler itself chooses what to keep; use"
                " dit.recompute=none or full"
            )
    if stage["kind"] == "fit" and config["trainer"].get("keep_best"):
        validation = config["trainer"].get("validation") or {}
        if not validation.get("every"):
            raise ConfigError(
                f"trainer.keep_best={config['trainer']['keep_best']}: stage={stage['name']} measures no val_loss here;"
                " set validation.every (stage=dit), or leave keep_best 0"
            )
    check_mix(config)
    check_styles(config)
    if config["requeues"] < 0:
        raise ConfigError(f"requeues={config['requeues']}: must be at least 0, which never starts a job again")
    for key, least in (("max_steps", 0), ("num_nodes", 1)):
        value = config["trainer"].get(key)
        if isinstance(value, int) and value < least:
            raise ConfigError(f"trainer.{key}={value}: must be at least {least}")


def check_frozen_text(config: Mapping[str, Any]) -> None:
    """Refuse a frozen text encoder where one is trained.

    Raises:
        ConfigError: names the key and the mend.
    """
    stage, folder = config["stage"], config["text"].get("folder")
    if stage["name"] == "captioner":
        raise ConfigError(
            f"text.folder={folder}: stage=captioner trains its text encoder, and this one is frozen; use text=byte"
        )
    if init := (stage.get("module") or {}).get("text_init"):
        raise ConfigError(
            f"stage.module.text_init={init}: begins a text encoder that is trained, and text.folder={folder} is frozen;"
            " use text=byte, or leave text_init null"
        )


def check_styles(config: Mapping[str, Any]) -> None:
    """Refuse captions of types that the captioner that is to learn from them has no style for.

    Raises:
        ConfigError: names the type and the two ways out.
    """
    if config["stage"]["name"] != "captioner":
        return
    styles, types = config["captioner"]["styles"], config["data"].get("caption_types") or {}
    for kind, weight in types.items():
        if kind not in ("gt", *styles) and weight > 0:  # what came with a clip is of a style by its length
            raise ConfigError(
                f"data.caption_types.{kind}={weight}: captioner.styles={styles} has no such style; append it there, or"
                f" set data.caption_types.{kind}=0"
            )
    if types.get("gt", 0) > 0 and not {"short", "long"} <= set(styles):
        raise ConfigError(
            f"data.caption_types.gt={types['gt']}: captions that came with clips teach the styles short and long, by"
            f" their length, and captioner.styles={styles} lacks one; append it, or set data.caption_types.gt=0"
        )


def check_mix(config: Mapping[str, Any]) -> None:
    """Refuse `data.mix` where it does not weigh the folders that the stage's data come from.

    Raises:
        ConfigError: names the weights and the folders.
    """
    stage, weights = config["stage"], config["data"].get("mix")
    if weights is None or not (stage["kind"] == "fit" or stage["name"] == "plan"):
        return
    key = "latents" if "latents" in stage["needs"] else "shards"
    places = config["inputs"][key]
    count = len(places) if isinstance(places, list) else 1
    numbers = isinstance(weights, list) and all(type(weight) in (int, float) for weight in weights)
    if not numbers or len(weights) != count or not all(0 < weight < math.inf for weight in weights):
        raise ConfigError(
            f"data.mix={weights}: must hold one positive number for each folder of inputs.{key} (here {count}), or be"
            " null, which takes all samples equally often"
        )


def validate(config: Mapping[str, Any]) -> None:
    """Check a resolved config: every key, every kind, and the rules across groups.

    Raises:
        ConfigError: the first thing found, in one line.
    """
    check_latents(config)  # its keys are of stage=dit alone
    if isinstance(config.get("parallel"), Mapping):
        check_parallel(config)  # what it is interpolated into would be blamed
    check_keys(config)
    check_across(config)
