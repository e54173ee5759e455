"""A stage's folder belongs to one config: the same command goes on, another is refused, nothing is lost by mistake."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import yaml
from data_tiny import write_clips

from soratrain import outputs
from soratrain.distributed import halt
from soratrain.errors import ConfigError, DataError
from soratrain.run import prepare, reasons_in, run


def config(**changes):
    base = {"fresh": False, "upstream": "make", "seed": 0, "stage": {"lr": 0.1}, "trainer": {"max_steps": 5}}
    return {**base, **changes}


def test_the_same_config_claims_its_folder_again(tmp_path):
    out = tmp_path / "run"
    outputs.claim(out, config(), compare=True)
    (out / "weights").mkdir()
    outputs.claim(out, config(upstream="fail"), compare=True)
    assert (out / "weights").is_dir()
    assert yaml.safe_load((out / "config.yaml").read_text())["seed"] == 0


def test_another_config_is_refused_naming_the_keys_and_changes_nothing(tmp_path):
    out = tmp_path / "run"
    outputs.claim(out, config(), compare=True)
    before = (out / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"stage\.lr: 0\.1 → 0\.2.*fresh=true"):
        outputs.claim(out, config(stage={"lr": 0.2}), compare=True)
    assert (out / "config.yaml").read_text() == before


def test_a_key_that_one_side_lacks_counts_as_a_difference():
    assert outputs.differences({"seed": 1}, {"seed": 1, "stage": {"c": 2}}) == ["stage.c: None → 2"]


def test_speed_and_speech_may_differ_between_starts():
    old = {"trainer": {"devices": 1, "logger": {"name": "csv"}}, "stage": {"data": {"workers": 0}}}
    new = {"trainer": {"devices": 2, "logger": {"name": "wandb"}}, "stage": {"data": {"workers": 4}}}
    assert outputs.differences(old, new) == []


def test_what_the_stage_does_not_use_may_differ():
    assert outputs.differences({"dit": {"dim": 8}, "seed": 1}, {"dit": {"dim": 16}, "seed": 1}) == []


def test_a_folder_in_which_nothing_was_made_is_given_up_and_any_other_is_not(tmp_path):
    for made in ("checkpoints/step-1", "metrics.csv"):
        out = tmp_path / "run"
        outputs.claim(out, config(), compare=True)
        (out / "log.txt").write_text("refused")
        (out / "checkpoints").mkdir()
        outputs.release(out)
        assert not out.exists()
        outputs.claim(out, config(stage={"lr": 0.2}), compare=True)
        (out / made).parent.mkdir(exist_ok=True)
        (out / made).write_text("made")
        outputs.release(out)
        with pytest.raises(ConfigError, match="was begun with another config"):
            outputs.claim(out, config(), compare=True)
        outputs.claim(out, config(fresh=True), compare=True)
        outputs.release(out)


def test_what_a_stage_takes_from_another_key_is_named_by_that_key() -> None:
    old = {"trainer": {"max_steps": 400}, "stage": {"module": {"max_steps": 400, "x": 1}, "data": {"max_steps": 400}}}
    new = {"trainer": {"max_steps": 25}, "stage": {"module": {"max_steps": 25, "x": 2}, "data": {"max_steps": 26}}}
    assert outputs.differences(old, new) == [
        "stage.data.max_steps: 400 → 26",
        "stage.module.x: 1 → 2",
        "trainer.max_steps: 400 → 25",
    ]


def test_a_command_that_the_data_refuse_claims_no_folder(tmp_path):
    write_clips(tmp_path / "shards", [(48, 64, 9)] * 4)
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    words = ["stage=vae", "machine=laptop", "upstream=fail", f"inputs.shards={tmp_path}/shards", f"out={tmp_path}/vae"]
    with pytest.raises(ConfigError, match="durations holds 33"):
        run(*prepare([*words, "data.durations=[1,33]"]))
    assert not (tmp_path / "vae").exists()


def test_the_folder_keeps_why_a_run_ended_whoever_ended_it(tmp_path, monkeypatch, capsys):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    with reasons_in(tmp_path):
        halt.end("rank 1 failed: TinyError: x", halt.OURS)  # as a thread does that hears of it
    with pytest.raises(ValueError), reasons_in(tmp_path):
        raise ValueError("a mistake\nand more of it")
    halt.end("of another run", halt.USERS)
    kept = "error: rank 1 failed: TinyError: x\nerror: ValueError: a mistake\n"
    assert (tmp_path / "log.txt").read_text() == kept
    assert codes == [1, 2] and capsys.readouterr().err.startswith("error: rank 1 failed: TinyError: x\n")


def test_fresh_starts_over_with_the_new_config(tmp_path):
    out = tmp_path / "run"
    outputs.claim(out, config(), compare=True)
    outputs.finish(out, {"loss": 1.0})
    outputs.claim(out, config(seed=7, fresh=True), compare=True)
    assert outputs.stored_result(out) is None
    stored = outputs.stored_config(out)
    assert stored["seed"] == 7 and stored["fresh"] is False


def test_fresh_never_removes_a_folder_that_no_run_made(tmp_path):
    (tmp_path / "photo.jpg").write_bytes(b"precious")
    with pytest.raises(ConfigError, match="no run made it"):
        outputs.claim(tmp_path, config(fresh=True), compare=True)
    assert (tmp_path / "photo.jpg").read_bytes() == b"precious"


def test_a_place_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        outputs.claim(tmp_path / "file" / "run", config(), compare=True)


def test_a_folder_that_cannot_be_emptied_is_one_clear_error_and_what_is_gone_already_is_none(tmp_path, monkeypatch):
    out, refuses, real = tmp_path / "run", [True], Path.unlink
    outputs.claim(out, config(), compare=True)
    (out / "samples").mkdir()
    (out / "samples" / "a.png").touch()

    def unlink(path, missing_ok=False):
        if refuses:
            raise PermissionError(1, "Operation not permitted", str(path))
        real(path, missing_ok=True)  # by another process, a moment before
        real(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(DataError, match=r"run: cannot be written \(Operation not permitted\)"):
            outputs.claim(out, config(fresh=True), compare=True)
        refuses.clear()
        outputs.claim(out, config(seed=7, fresh=True), compare=True)
    assert [path.name for path in out.iterdir()] == ["config.yaml"]
    assert outputs.stored_config(out)["seed"] == 7


def test_where_the_first_rank_may_be_emptying_a_folder_the_others_look_and_do_not_touch(tmp_path, monkeypatch):
    before = tmp_path.stat().st_mtime_ns  # a name that comes and goes is a change
    outputs.check_writable(tmp_path / "run", probe=False)
    assert tmp_path.stat().st_mtime_ns == before
    monkeypatch.setattr(os, "access", lambda place, mode: False)
    with pytest.raises(DataError, match=r"run: cannot be written \(Permission denied\); give run=NAME"):
        outputs.check_writable(tmp_path / "run", probe=False)


def test_each_rank_that_cannot_write_says_so_and_only_the_first_writes_a_file_to_find_out(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    config, words = prepare(["stage=vae", "machine=laptop", "upstream=fail", f"out={tmp_path}/file/run"])
    real, probes = tempfile.NamedTemporaryFile, []
    monkeypatch.setattr(tempfile, "NamedTemporaryFile", lambda **given: probes.append(given) or real(**given))
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(DataError, match=r"file/run: cannot be written \(Not a directory\)") as refused:
            run(config, words)
        assert not refused.value.alike  # nobody knows whether another one can
    assert len(probes) == 1


def test_a_result_survives_a_round_trip_and_is_what_marks_the_end(tmp_path):
    assert outputs.stored_result(tmp_path) is None
    outputs.finish(tmp_path, {"loss": 0.5, "text": "三只猫"})
    assert outputs.stored_result(tmp_path) == {"loss": 0.5, "text": "三只猫"}


def test_the_fingerprint_follows_what_the_maker_wrote(tmp_path):
    assert outputs.fingerprint(tmp_path) == "unknown"
    outputs.finish(tmp_path, {"loss": 0.5})
    first = outputs.fingerprint(tmp_path)
    outputs.finish(tmp_path, {"loss": 0.4})
    assert outputs.fingerprint(tmp_path) != first


def test_the_fingerprint_of_a_folder_of_videos_follows_the_videos(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"1")
    first = outputs.fingerprint(tmp_path)
    (tmp_path / "notes.txt").write_bytes(b"1")
    assert outputs.fingerprint(tmp_path) == first != "unknown"
    (tmp_path / "b.mp4").write_bytes(b"1")
    assert outputs.fingerprint(tmp_path) != first


def test_a_run_goes_on_only_from_the_upstream_that_it_began_with(tmp_path):
    shards, out = tmp_path / "shards", tmp_path / "vae"
    shards.mkdir()
    out.mkdir()
    outputs.finish(shards, {"clips": 1})
    outputs.bind_upstream(out, [("shards", str(shards))])
    outputs.bind_upstream(out, [("shards", str(shards))])
    outputs.finish(shards, {"clips": 2})
    with pytest.raises(ConfigError, match=r"inputs\.shards=.* was made anew since"):
        outputs.bind_upstream(out, [("shards", str(shards))])
