"""What is missing upstream is made by one named command, or is an error that names it."""

from __future__ import annotations

import json
import subprocess

import pytest

from soratrain import upstream
from soratrain.errors import DataError


def config(tmp_path, **changes):
    base = {
        "upstream": "make",
        "stage": {"needs": ["vae"]},
        "inputs": {"vae": str(tmp_path / "vae"), "shards": str(tmp_path / "shards")},
        "machine": {"world": {"clips": 7}},
    }
    return {**base, **changes}


def make_vae(folder, *, finished=True):
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "vae.safetensors").write_bytes(b"")
    if finished:
        (folder / "result.json").write_text(json.dumps({}))


@pytest.fixture
def calls(monkeypatch, tmp_path):
    made = []

    def run(words, check):
        made.append(words)
        make_vae(tmp_path / "vae")
        return subprocess.CompletedProcess(words, 0)

    monkeypatch.setattr(upstream.subprocess, "run", run)
    return made


def test_what_is_there_is_not_made_again(tmp_path, calls):
    make_vae(tmp_path / "vae")
    upstream.ensure(config(tmp_path), [])
    assert calls == []


def test_an_unfinished_result_of_this_run_is_gone_on_with(tmp_path, calls):
    make_vae(tmp_path / "vae", finished=False)
    (tmp_path / "vae" / "weights" / "vae.safetensors").unlink()
    (tmp_path / "vae" / "weights").rmdir()
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
    with pytest.raises(DataError, match=r"inputs\.vae=.*holds no vae"):
        upstream.ensure(config(tmp_path), [f"inputs.vae={tmp_path / 'vae'}"])
    assert calls == []


def test_a_maker_that_fails_is_named_with_its_exit_code(tmp_path, monkeypatch):
    monkeypatch.setattr(upstream.subprocess, "run", lambda words, check: subprocess.CompletedProcess(words, 2))
    with pytest.raises(DataError, match=r"could not be made \(exit code 2\)"):
        upstream.ensure(config(tmp_path), [])


def test_shards_are_made_by_data_prep_at_the_machines_size(tmp_path):
    words = upstream.command("shards", config(tmp_path), [])
    assert words[1:] == ["-m", "data_prep", "input=world", f"output={tmp_path / 'shards'}", "world.clips=7"]
