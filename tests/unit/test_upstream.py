"""What is missing upstream is made by one named command, or is an error that names it."""

from __future__ import annotations

import json

import pytest

from soratrain import outputs, upstream
from soratrain.errors import DataError


def config(tmp_path, **changes):
    base = {
        "upstream": "make",
        "stage": {"needs": ["vae"]},
        "inputs": {"vae": str(tmp_path / "vae"), "shards": str(tmp_path / "shards")},
        "machine": {"world": {"clips": 7}},
    }
    return {**base, **changes}


def make_vae(folder):
    (folder / "weights").mkdir(parents=True, exist_ok=True)
    (folder / "weights" / "vae.safetensors").write_bytes(b"")
    (folder / "result.json").write_text(json.dumps({}))


@pytest.fixture
def calls(monkeypatch, tmp_path):
    made = []

    def run(words):
        made.append(words)
        make_vae(tmp_path / "vae")
        return 0

    monkeypatch.setattr(upstream, "run_child", run)
    return made


def test_what_is_there_is_not_made_again(tmp_path, calls):
    make_vae(tmp_path / "vae")
    upstream.ensure(config(tmp_path), [])
    assert calls == []


def test_an_unfinished_result_of_this_run_is_gone_on_with(tmp_path, calls):
    make_vae(tmp_path / "vae")
    (tmp_path / "vae" / "result.json").unlink()  # its weights are there: it was cut off just before its end
    (tmp_path / "vae" / "config.yaml").write_text("stage: {name: vae}")
    upstream.ensure(config(tmp_path), [])
    assert calls[0][1:] == ["-m", "soratrain", "stage=vae"]


def test_run_machine_and_net_choices_reach_the_command_that_makes_it_and_no_others_do(tmp_path, calls):
    given = ["stage=dit", "run=media", "machine=laptop", "vae=tiny", 'inputs.shards="data/media"', "optimizer.lr=1.0"]
    upstream.ensure(config(tmp_path), given)
    assert calls[0][3:] == ["stage=vae", "run=media", "machine=laptop", "vae=tiny", 'inputs.shards="data/media"']


def test_upstream_fail_names_the_command_and_starts_nothing(tmp_path, calls):
    with pytest.raises(DataError, match=r"make it first: python -m soratrain stage=vae run=a"):
        upstream.ensure(config(tmp_path, upstream="fail"), ["run=a"])
    assert calls == []


def test_a_path_that_was_given_and_is_empty_is_an_error_even_where_things_may_be_made(tmp_path, calls):
    said = r"inputs\.vae=.*holds no finished vae \(weights/vae.safetensors\); give another path$"
    with pytest.raises(DataError, match=said):  # no stage makes a folder there
        upstream.ensure(config(tmp_path), [f"inputs.vae={tmp_path / 'vae'}"])
    assert calls == []


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("outputs/mine/vae/base", "python -m soratrain stage=vae run=mine inputs.shards=data/mine vae=s"),
        ("outputs/mine/vae/vae_a/", "stage=vae run=mine inputs.shards=data/mine vae=s +experiment=vae_a"),
        ("outputs/default/vae/base", "python -m soratrain stage=vae vae=s"),
        ("outputs/other/vae/vae_a", "python -m soratrain stage=vae run=other vae=s +experiment=vae_a"),
        ("outputs/other/dit/base", ""),
        ("outputs/other/vae/lr_1", ""),
        ("elsewhere/mine/vae/base", ""),
        ("vae", ""),
    ],
)
def test_the_command_of_a_path_that_was_given_makes_that_path(tmp_path, monkeypatch, place, said):
    monkeypatch.chdir(tmp_path)
    given = ["stage=encode", "run=mine", "inputs.shards=data/mine", "vae=s", f"inputs.vae={place}"]
    with pytest.raises(DataError) as caught:
        upstream.ensure(config(tmp_path, run="mine", inputs={"vae": place}), given)
    mend = f", or make it: {said}" if said.startswith("python") else said
    assert str(caught.value).endswith(mend or "; give another path")


def test_shards_that_are_videos_are_not_overwritten_by_the_mend(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "films").mkdir()
    (tmp_path / "films" / "a.mp4").write_bytes(b"a")
    shards = config(tmp_path, stage={"needs": ["shards"]}, inputs={"shards": "films"})
    with pytest.raises(DataError, match=r"these are videos.*data_prep input=films output=data/films,"):
        upstream.ensure(shards, ["inputs.shards=films"])


def test_a_maker_that_fails_is_named_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream, "run_child", lambda words: 2)
    with pytest.raises(DataError, match=r"could not be made \(exit code 2\)"):
        upstream.ensure(config(tmp_path), [])


def test_what_was_made_from_something_older_is_refused_at_any_depth(tmp_path, calls):
    make_vae(tmp_path / "shards")
    make_vae(tmp_path / "vae")
    (tmp_path / "vae" / "config.yaml").write_text("stage: {name: vae}\nrun: mine\n")
    outputs.bind_upstream(tmp_path / "vae", [("shards", str(tmp_path / "shards"))])
    upstream.ensure(config(tmp_path), [])
    (tmp_path / "latents").mkdir()
    outputs.bind_upstream(tmp_path / "latents", [("vae", str(tmp_path / "vae"))])
    (tmp_path / "shards" / "result.json").write_text('{"made": "anew"}')
    for place in ("vae", "latents"):
        with pytest.raises(DataError, match=r"shards, which has been made anew.*stage=vae run=mine fresh=true"):
            upstream.check_current(str(tmp_path / place))


def test_what_an_experiment_continues_is_made_first_or_named_with_its_command(tmp_path, calls, monkeypatch):
    place = tmp_path / "vae_a"
    wanted = config(tmp_path, init=str(place), stage={"name": "vae", "kind": "fit", "needs": []})
    command = ["stage=vae", "run=a", "machine.steps.vae_a=5", "lpips.vgg=x", "+experiment=vae_a"]
    given = [*command[1:4], "+experiment=vae_b", "optimizer.lr=1"]
    with pytest.raises(DataError, match=r"init=.*vae_a: missing or unfinished; make it first: .* \+experiment=vae_a"):
        upstream.ensure({**wanted, "upstream": "fail"}, given)
    monkeypatch.setattr(upstream, "run_child", lambda words: calls.append(words) or make_vae(place) or 0)
    upstream.ensure(wanted, given)
    assert [words[3:] for words in calls] == [command]
    elsewhere = config(tmp_path, init="elsewhere", stage={"name": "vae", "kind": "fit", "needs": []})
    upstream.ensure(elsewhere, ["init=elsewhere"])
    assert len(calls) == 1
    (place / "config.yaml").write_text("stage: {name: vae}\nrun: a\n")
    outputs.bind_upstream(place, [("init", str(tmp_path / "old"))])
    make_vae(tmp_path / "old")
    with pytest.raises(DataError, match=r"made from init=.*stage=vae \+experiment=vae_a run=a fresh=true"):
        upstream.ensure(wanted, given)


def test_what_a_vae_of_a_larger_stride_asks_for_reaches_the_stage_that_needs_it(tmp_path):
    given = ["vae=hc", "buckets.grid=32", "dit.patch=[1,1,1]", "sampler.steps=2"]
    for key, words in {"latents": given[:3], "dit": given[:3], "vae": [given[0], given[2]]}.items():
        assert upstream.command(key, str(tmp_path), config(tmp_path), given)[4:] == words


def test_latents_that_are_not_complete_are_no_upstream(tmp_path):
    (tmp_path / "dataset.json").write_text('{"complete": false}')
    assert not upstream.holds("latents", str(tmp_path))
    (tmp_path / "dataset.json").write_text('{"complete": true}')
    assert upstream.holds("latents", str(tmp_path))


def test_shards_are_made_by_data_prep_at_the_machines_size(tmp_path):
    words = upstream.command("shards", config(tmp_path)["inputs"]["shards"], config(tmp_path), [])
    assert words[1:] == ["-m", "data_prep", "input=world", f"output={tmp_path / 'shards'}", "world.clips=7"]


def test_an_upstream_of_another_net_than_asked_for_is_refused(tmp_path, calls):
    make_vae(tmp_path / "vae")
    (tmp_path / "vae" / "config.yaml").write_text("stage: {name: vae}\nvae: {dim: 1}\n")
    upstream.ensure(config(tmp_path, vae={"dim": 2}), [])
    with pytest.raises(DataError, match="vae: .* was made with another one than you ask for"):
        upstream.ensure(config(tmp_path, vae={"dim": 2}), ["vae=s"])
    upstream.ensure(config(tmp_path, vae={"dim": 1}), ["vae=s"])


def test_a_dit_of_another_objective_than_asked_for_is_refused_and_one_that_is_missing_made_with_it(tmp_path, calls):
    (tmp_path / "config.yaml").write_text("stage: {name: dit}\nobjective: {shift: 1}\n")
    upstream.check_nets(str(tmp_path), config(tmp_path, objective={"shift": 2}), set())
    with pytest.raises(DataError, match="objective: .* was made with another one than you ask for"):
        upstream.check_nets(str(tmp_path), config(tmp_path, objective={"shift": 2}), {"objective"})
    (tmp_path / "config.yaml").write_text("stage: {name: encode}\nobjective: {shift: 1}\n")  # it has no part in these
    upstream.check_nets(str(tmp_path), config(tmp_path, objective={"shift": 2}), {"objective"})
    assert upstream.command("dit", "", config(tmp_path), ["objective=ddpm"])[4:] == ["objective=ddpm"]
    assert upstream.command("vae", "", config(tmp_path), ["objective=ddpm"])[4:] == []


def test_latents_with_another_text_do_for_a_frozen_encoder_which_looks_for_itself_and_a_dit_does_not(tmp_path):
    frozen = {"_target_": "soratrain.models.frozen_text.FrozenText", "folder": "t5", "features": "live"}
    (tmp_path / "config.yaml").write_text("stage: {name: encode}\ntext: {dim: 1}\n")
    upstream.check_nets(str(tmp_path), config(tmp_path, text=frozen), {"text"})
    with pytest.raises(DataError, match="text: .* was made with another one than you ask for"):
        upstream.check_nets(str(tmp_path), config(tmp_path, text={"dim": 2}), {"text"})
    (tmp_path / "config.yaml").write_text(json.dumps({"stage": {"name": "dit"}, "text": frozen}))
    upstream.check_nets(str(tmp_path), config(tmp_path, text=frozen | {"features": "auto"}), {"text"})
    with pytest.raises(DataError, match="text: .* was made with another one than you ask for"):
        upstream.check_nets(str(tmp_path), config(tmp_path, text=frozen | {"folder": "umt5"}), {"text.folder"})


def test_a_frozen_text_encoder_of_the_dit_is_none_of_the_vaes_and_of_the_captioners_business(tmp_path):
    frozen = {"_target_": "soratrain.models.frozen_text.FrozenText", "folder": "t5"}
    for stage in ("vae", "captioner", "recaption"):
        (tmp_path / "config.yaml").write_text(f"stage: {{name: {stage}}}\ntext: {{dim: 1}}\n")
        upstream.check_nets(str(tmp_path), config(tmp_path, text=frozen), {"text"})
    words = ["text=t5", "text.folder=t5", "machine=laptop"]
    for key in ("captions", "captioner"):
        assert upstream.command(key, "", config(tmp_path, text=frozen), words)[4:] == ["machine=laptop"]
        assert upstream.command(key, "", config(tmp_path, text={"dim": 2}), words)[4:] == words
    assert upstream.command("latents", "", config(tmp_path, text=frozen), words)[4:] == words


def test_another_s_vae_is_seen_to_be_the_one_asked_for_and_never_made(tmp_path, calls):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan", "z_dim": 16}))
    wan, ours = (
        {"_target_": f"soratrain.models.{name}", "latent_channels": 16} for name in ("published.Wan", "vae.VAE")
    )
    upstream.ensure(config(tmp_path, vae=wan), [])
    with pytest.raises(DataError, match="holds weights of AutoencoderKLWan, .* say vae=wan"):
        upstream.ensure(config(tmp_path, vae=ours), [])
    (tmp_path / "vae" / "config.json").unlink()
    with pytest.raises(DataError, match="inputs.vae=.*: holds no VAE that diffusers wrote"):
        upstream.ensure(config(tmp_path, vae=wan), [])
    assert calls == []


def test_a_job_under_an_experiment_of_training_needs_nothing_that_the_training_begins_from(tmp_path, calls):
    job = {"name": "encode", "kind": "job", "needs": []}
    upstream.ensure(config(tmp_path, init=str(tmp_path / "images_256"), stage=job), ["+experiment=video_256"])
    assert not calls
