"""Everything shipped in conf/ composes, checks and builds; everything mistyped is one line that names the mend."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from soratrain.compose import LIST_KEYS, TEXT_KEYS, compose
from soratrain.errors import ConfigError
from soratrain.quoting import quote
from soratrain.rules import PUBLISHED, validate
from soratrain.run import instantiate, prepare, run
from soratrain.schema import CONF, groups

STAGES = groups()["stage"]
OPTIONS = [
    f"{group}={option}"
    for group, options in groups().items()
    for option in options
    if group not in ("stage", "experiment", "machine", "data", "expand")  # stage=sample alone has it
]


@pytest.mark.parametrize("machine", groups()["machine"])
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_composes_for_every_machine(stage, machine):
    config, _ = prepare([f"stage={stage}", f"machine={machine}"])
    assert config["out"] == f"outputs/default/{stage}/base"
    assert config["machine"]["name"] == machine


@pytest.mark.parametrize("option", OPTIONS)
def test_every_group_option_composes(option):
    group, name = option.split("=")
    also = {"strategy": ["optimizer=adamw"], "sampler": ["objective=ddpm"] if name in ("ddim", "ancestral") else []}
    also |= {of: [f"{of}.folder=somewhere"] if name == "hf" else [] for of in ("text", "engine", "expand")}
    config, choices = compose(["stage=dit", "machine=laptop", option, *also.get(group, [])])
    validate(config)
    assert choices[group] == name


def stage_of(experiment):
    """Return the stage that the command in an experiment's header names."""
    return re.search(r"^# python -m soratrain stage=(\w+)", (CONF / f"experiment/{experiment}.yaml").read_text(), re.M)[
        1
    ]


@pytest.mark.parametrize("machine", groups()["machine"])
@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_every_experiment_composes_and_owns_a_folder(experiment, machine):
    stage = stage_of(experiment)
    config, _ = prepare([f"stage={stage}", f"+experiment={experiment}", f"machine={machine}"])
    assert config["out"] == f"outputs/default/{stage}/{experiment}"


def test_several_experiments_at_once_own_a_folder_of_both_names():
    config, _ = prepare(["stage=dit", "+experiment=[native_res,segments]", "machine=laptop"])
    assert config["out"] == "outputs/default/dit/native_res+segments"


@pytest.mark.parametrize("experiment", groups()["experiment"])
def test_experiments_leave_sizes_precision_and_steps_to_the_machine(experiment):
    stage = stage_of(experiment)
    base, _ = prepare([f"stage={stage}", "machine=laptop"])
    refined, _ = prepare([f"stage={stage}", f"+experiment={experiment}", "machine=laptop"])
    assert refined["machine"] == base["machine"]
    for key in ("vae", "dit", "captioner"):
        assert refined[key] == base[key]
    assert refined["trainer"]["precision"] == base["trainer"]["precision"]
    steps = base["machine"]["steps"]
    assert refined["trainer"]["max_steps"] == steps.get(experiment, steps[stage])


@pytest.mark.parametrize("group", ["vae", "dit", "captioner", "text"])
def test_every_net_builds_on_meta(group):
    for option in groups()[group]:
        given = ["text.folder=somewhere"] if option == "hf" else []
        config, _ = compose(["stage=dit", "machine=laptop", f"{group}={option}", *given])
        if config[group]["_target_"] == "soratrain.models.vlm.VLM":
            continue  # made of others' nets, which are not here: test_vlm.py builds it
        with torch.device("meta"):
            if config[group]["_target_"].startswith(PUBLISHED):
                continue  # another's, which is loaded and never built
            net = instantiate(config[group])()
        assert sum(parameter.numel() for parameter in net.parameters()) > 0


@pytest.mark.parametrize("stage", [["stage=vae"], ["stage=plan", "stage.job.target=vae"]])
def test_a_vae_that_others_have_trained_is_not_trained(stage):
    config, _ = compose([*stage, "machine=laptop", "vae=wan"])
    with pytest.raises(ConfigError, match="vae=wan is a VAE that others have trained.*stage=encode"):
        validate(config)


@pytest.mark.parametrize(("option", "dim"), [("t5", 4096), ("umt5", 4096), ("clip", 768)])
def test_a_frozen_text_encoder_is_for_encoding_and_the_dit_which_is_as_wide_as_its_features(option, dim):
    for stage in ("encode", "dit"):
        config, _ = compose([f"stage={stage}", "machine=laptop", f"text={option}"])
        validate(config)
        assert config["text"]["dim"] == config["dit"]["text_dim"] == dim
    config, _ = compose(["stage=captioner", "machine=laptop", f"text={option}"])
    with pytest.raises(ConfigError, match="stage=captioner trains its text encoder, .* use text=byte"):
        validate(config)
    config, _ = compose(["stage=dit", "machine=laptop", f"text={option}", "stage.module.text_init=there"])
    with pytest.raises(ConfigError, match="text_init=there: .* is frozen; use text=byte, or leave text_init null"):
        validate(config)


def test_the_channels_of_another_s_vae_reach_the_dit():
    config, _ = compose(["stage=dit", "machine=laptop", "vae=wan22"])
    validate(config)
    assert config["dit"]["channels"] == 48


def test_latents_made_live_want_clips_and_a_vae_in_the_place_of_latents():
    config, _ = prepare(["stage=dit", "machine=laptop", "latents=live", "run=a"])
    assert config["stage"]["needs"] == ["shards", "captions", "vae"]
    assert config["stage"]["data"]["_target_"].endswith("VideoData")
    assert config["stage"]["data"]["captions"] == "outputs/a/recaption/base"
    assert config["stage"]["module"]["vae"] == "outputs/a/vae/base"
    cached, _ = prepare(["stage=dit", "machine=laptop", "latents=cached"])
    assert cached == prepare(["stage=dit", "machine=laptop"])[0] and cached["stage"]["module"]["vae"] is None
    assert cached["stage"]["data"]["tokens_per_batch"] == config["stage"]["data"]["tokens_per_batch"]


@pytest.mark.parametrize("conditioning", groups()["conditioning"])
def test_the_ends_that_a_mix_gives_are_those_that_the_data_hand_on(conditioning):
    config, _ = prepare(["stage=dit", "machine=laptop", f"conditioning={conditioning}"])
    built = instantiate(config["conditioning"])
    assert config["stage"]["data"]["tails"] == list(built.tail_frames)
    assert built.mixed == (conditioning != "t2v")
    assert set(built.tail_frames) <= set(prepare(["stage=encode"])[0]["stage"]["job"]["tail_frames"])


@pytest.mark.parametrize("experiment", [name for name in groups()["experiment"] if stage_of(name) == "dit"])
def test_what_is_validated_is_held_out_and_what_is_drawn_is_of_the_experiments_size(experiment, tmp_path):
    words = ["stage=dit", f"+experiment={experiment}", "validation.clips=7"]
    for machine in groups()["machine"]:
        config, _ = prepare([*words, f"machine={machine}"])
        assert config["stage"]["data"]["held_out"]["clips"] == 7
        drawn = instantiate(config["trainer"]["previews"])(out=tmp_path, metrics=None, ema=None, precision="32-true")
        size = config["machine"]["tuned"].get(experiment, {}).get("size", config["machine"]["size"])
        assert f"{drawn.width}x{drawn.height}" == size and drawn.every > 0


def test_validation_none_holds_nothing_out_and_does_nothing():
    config, _ = prepare(["stage=dit", "machine=laptop", "validation=none"])
    assert instantiate(config["stage"]["data"]["held_out"]).count == 0
    assert config["trainer"]["validation"]["every"] == config["trainer"]["previews"]["every"] == 0


def test_several_prompts_to_watch_may_hold_any_text():
    words = quote(["validation.prompts=[a café (red), 三只猫]"], TEXT_KEYS, LIST_KEYS)
    config, _ = prepare(["stage=dit", "machine=laptop", *words])
    assert config["validation"]["prompts"] == ["a café (red)", "三只猫"]
    config, _ = prepare(
        ["stage=dit", "machine=laptop", *quote(["validation.prompts=one, alone"], TEXT_KEYS, LIST_KEYS)]
    )
    assert config["trainer"]["previews"]["prompts"] == "one, alone"


def test_the_command_line_wins_over_experiment_stage_and_machine():
    config, _ = prepare(
        ["stage=dit", "+experiment=native_res", "machine=laptop", "dit=s", "data.gamma=0.25", "optimizer=adamw"]
    )
    assert config["dit"]["dim"] == 1024
    assert config["data"]["gamma"] == 0.25
    assert config["optimizer"]["name"] == "adamw"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["stage=dit", "rnu=a"], "rnu=a: no such key; did you mean 'run'"),
        (["stage=dit", "dit=tinny"], "dit=tinny: no such option; did you mean 'tiny'"),
        (["stage=dti"], "stage=dti: no such option; did you mean 'dit'"),
        (["stage=dit", "dit.dmi=3"], "dit.dmi: no such key; did you mean 'dim'"),
        (["stage=dit", "+dit.dmi=3"], "dit.dmi=3: no such key; did you mean 'dim'"),
        (["stage=dit", "+machine.steps.dti=3"], "machine.steps.dti=3: no such key; did you mean 'dit'"),
        (["stage=dit", "trainer.max_stesp=3"], "trainer.max_stesp: no such key; did you mean 'max_steps'"),
        (["stage=dit", "dit.dim=wide"], "dit.dim='wide': must be a whole number"),
        (["stage=dit", "machine.workers=many"], "machine.workers='many': must be like"),
        (["stage=dit", "optimizer.learning_rate=1"], "optimizer.learning_rate: no such key; did you mean 'lr'"),
        (["stage=dit", "validation.levls=3"], "validation.levls: no such key; did you mean 'levels'"),
        (["stage=dit", "validation.levels=many"], "validation.levels='many': must be like 10"),
        (["stage=dit", "seed=abc"], "seed='abc': must be a whole number"),
        (["stage=dit", "experiment=native_res"], r"write \+experiment=native_res"),
        (["stage=dit", "+experiment=null"], "experiment=null: leave it out"),
        (["stage=dit", "+experiment=nativ"], "experiment=nativ: no such option; did you mean 'native_res'"),
        (["stage=dit", "machine=laptopp"], "machine=laptopp: no such option; did you mean 'laptop'"),
        (["stage=sample", "task=animat"], "task=animat: no such option; did you mean 'animate'"),
        (["stage=sample", "task=animate", "task.video=a.mp4"], "task.video: no such key; known: image"),
        (["stage=sample", "task=edit", "task.strengh=0.5"], "task.strengh: no such key; did you mean 'strength'"),
        (
            ["stage=sample", "task=extend", "task.direction=up"],
            "task.direction='up': must be 'forwards' or 'backwards'",
        ),
        (["stage=sample", "size=64"], "size=64: must be WIDTHxHEIGHT, such as 64x48"),
        (["stage=dit", "upstream=perhaps"], "upstream='perhaps': must be make or fail"),
        (["stage=dit", "run=a/b"], "run='a/b': must be a folder name"),
        (["stage=dit", "trainer.max_steps=-1"], "trainer.max_steps=-1: must be at least 0"),
        (["stage=dit", "strategy=zero3", "optimizer=muon"], "optimizer=muon with strategy=zero3.*use optimizer=adamw"),
        (
            ["stage=dit", "objective=ddpm", "sampler=euler"],
            "sampler=euler does not fit objective=ddpm; use sampler=auto",
        ),
        (
            ["stage=dit", "strategy=zero2", "optimizer=adamw", "optimizer.clip_adaptive=3"],
            "clip_adaptive=3 with .*=zero2",
        ),
        (["stage=dit", "sampler=ddim"], "sampler=ddim does not fit objective=flow; .*euler, heun, dpmpp"),
        (["stage=vae", "inputs.shards=[a,b]", "data.mix=[0.7]"], r"data.mix=\[0.7\]: .*inputs.shards \(here 2\)"),
        (["stage=vae", "data.mix=[0.7,0.3]"], r"data.mix=\[0.7, 0.3\]: .*inputs.shards \(here 1\)"),
        (["stage=vae", "inputs.shards=[a,b]", "data.mix=[1,x]"], "data.mix=.*a list of numbers"),
        (["stage=plan", "inputs.shards=[a,b]", "data.mix=[1,0]"], "data.mix=.*one positive number"),
        (["stage=vae", "inputs.shards=[a,b]", "data.mix=[1,inf]"], "data.mix=.*one positive number"),
        (["stage=dit", "inputs.latents=[a,b]", "data.mix=[1]"], r"data.mix=\[1\]: .*inputs.latents \(here 2\)"),
        (["stage=vae", "+experiment=vae_c", "strategy=zero2", "optimizer=adamw"], "zero2: DeepSpeed.*use strategy=ddp"),
        (
            ["stage=vae", "+experiment=vae_c", "optimizer.disc.rl=1"],
            "optimizer.disc.rl: no such key; did you mean",
        ),
        (["stage=vae", "+experiment=vae_c", "+stage.module.adversary.net.width=1"], "net.width=1: no such key"),
        (
            ["stage=captioner", "+data.caption_types.mood=1"],
            r"data.caption_types.mood=1: captioner.styles=.* has no such style; append it there, or set",
        ),
        (
            ["stage=captioner", "captioner.styles=[long,tags,camera]", "data.caption_types.short=0"],
            r"data.caption_types.gt=1.0: .*by their length.*captioner.styles=\['long', .* lacks one",
        ),
        (["stage=vae", "trainer.keep_best=2"], "keep_best=2: stage=vae measures no val_loss here"),
        (["stage=dit", "validation=none", "trainer.keep_best=1"], "keep_best=1: stage=dit .*set validation.every"),
        (["stage=vae", "latents=live"], "latents=live: only stage=dit"),
        (["stage=plan", "target=vae", "latents=live"], "latents=live: only stage=dit"),
        (["stage=plan", "target=dit", "latents=live", "data.batching=pack"], "data.batching=pack with latents=live"),
        (["stage=sample", "latents=live"], "latents=live: only stage=dit"),
        (["stage=dit", "latents=lvie"], "latents=lvie: no such option; did you mean 'live'"),
        (
            ["stage=dit", "latents=live", "+experiment=native_res"],
            "data.batching=pack with latents=live.*data.batching=bucket",
        ),
        (["stage=dit", "conditioning.mix.prefx=0.1"], "conditioning.mix.prefx: no such key; did you mean 'prefix'"),
        (["stage=dit", "conditioning=segments", "conditioning.ramp=long"], "ramp='long': must be a number"),
        (["stage=sample", "sampler.guidance_interval=0.5"], "guidance_interval=0.5: must be a list of numbers"),
        (["stage=sample", "sampler.guidance_interval=[a,b]"], "guidance_interval=.*: must be a list of numbers"),
        (["stage=dit", "dit.patch=[2,2]"], r"dit.patch=\[2, 2\]: must be a list of 3 whole numbers"),
        (["stage=dit", "conditioning.mix.prefix=many"], "conditioning.mix.*: must be "),
        (["stage=dit", "optimizer.lr=nan"], "optimizer.lr=nan: must be a number"),
        (["stage=sample", "fps=nan"], "^fps=nan: must be a number or null"),
        (["stage=dit", "seed=1.5"], "^seed=1.5: must be a whole number"),
        (["stage=sample", 'out=""'], "^out is empty"),
        (["stage"], "is not an override; write key=value"),
        (["stage=dit", "run=(a"], "cannot be read"),
        (["run=a"], "stage is missing"),
    ],
)
def test_what_is_mistyped_is_named_with_the_mend(overrides, said):
    with pytest.raises(ConfigError, match=said) as caught:
        prepare(overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["dit.num_heads=5"], "dit: num_heads=5 do not divide dim=192"),
        (["dit.depth=0"], "dit: .*depth=0.* must be at least 1"),
        (["dit.rope_time=frames"], "dit: rope_time 'frames' is unknown"),
        (["dit.patch=[1,0,2]"], r"dit: .*patch=\[1, 0, 2\] must be at least 1"),
    ],
)
def test_nets_that_cannot_be_built_are_refused_before_a_folder_is_touched(values, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["stage=dit", "machine=laptop", *values]
    with pytest.raises(ConfigError, match=said):
        run(*prepare(words))
    assert list(tmp_path.iterdir()) == []


def test_a_text_reaches_its_stage_as_it_was_typed():
    text = "it costs ${5}, ${ and \\${seed}"
    words = quote(["stage=sample", f"prompt={text}", f"validation.prompts=[{text}]"], TEXT_KEYS, LIST_KEYS)
    config, _ = prepare([*words, "machine=laptop"])
    target = {"_target_": "builtins.dict"}
    built = instantiate({**target, "prompt": config["prompt"], "inner": {**target, "texts": [config["prompt"]]}})
    assert built == {"prompt": text, "inner": {"texts": [text]}}


def test_the_command_line_reports_a_mistake_in_one_line_with_exit_code_2(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "soratrain", "stage=dit", "dit=tinny"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: dit=tinny: no such option") and done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_help_lists_every_stage_and_option():
    done = subprocess.run([sys.executable, "-m", "soratrain", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    for group, options in groups().items():
        assert any(
            line.split()[:1] == [group] and set(options) <= set(line.split()) for line in done.stdout.splitlines()
        )
