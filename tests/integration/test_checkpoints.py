"""Checkpoints of runs: which stay, what becomes of a full disk, and what any number of ranks says of a wrong one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_strategies import outcome, same_training, steps
from tiny_training import Measured, Net, train

from soratrain.callbacks import export
from soratrain.distributed import checkpoint
from soratrain.distributed.checkpoint import (
    CheckpointReader,
    UnreadableError,
    latest_checkpoint,
    read_state,
    saved_checkpoints,
)
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights

HERE = Path(__file__).parent
LOSSES = {1: 0.9, 2: 0.5, 3: 0.4, 4: 0.7, 5: 0.3, 6: float("nan"), 7: 0.6, 8: 0.45, 9: 0.8}


def names(out: Path) -> list[int]:
    return [int(folder.name[5:]) for folder in saved_checkpoints(out / "checkpoints")]


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("single", 1), pytest.param("ddp", 2, marks=pytest.mark.full), ("zero2", 2)]
)
def test_a_checkpoint_written_beside_training_is_the_one_that_training_waits_for(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": ranks, "ema": 0.9, "max_steps": 7, "keep": 9}
    for name in (True, False):
        run_ranks(outcome, ranks, out=str(tmp_path / str(name)), trainer={"checkpoint_async": name}, **settings)
    one, other = (sorted((tmp_path / name / "checkpoints").rglob("*")) for name in ("True", "False"))
    assert [path.name for path in one] == [path.name for path in other] and names(tmp_path / "True") == [2, 4, 6, 7]
    for left, right in zip(one, other, strict=True):
        assert left.is_dir() or left.read_bytes() == right.read_bytes()


def test_the_newest_and_the_best_stay_and_a_good_step_is_saved_whenever_it_comes(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"max_steps": 10, "checkpoint_every": 4, "keep": 1}
    how = {"keep_best": 2, "validation": partial(Measured, LOSSES)}
    for run, stop_at in (("whole", 0), ("broken", 4), ("broken", 0)):
        _, _, result = train(tmp_path / run, stop_at=stop_at, trainer=how, **settings)
        if stop_at:
            assert names(tmp_path / run) == [2, 3, 4] or names(tmp_path / run) == [2, 3]
    for run in ("whole", "broken"):
        assert names(tmp_path / run) == [3, 5, 10]
        assert read_state(tmp_path / run / "checkpoints" / "step-00000005")["score"] == 0.3
        assert read_state(tmp_path / run / "checkpoints" / "step-00000010")["score"] is None
    assert result["best_step"] == 5 and result["best_val_loss"] == 0.3


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("single", 1), ("zero2", 2), pytest.param("zero3", 2, marks=pytest.mark.full)]
)
def test_the_best_checkpoint_can_be_exported_and_the_run_is_none_the_worse(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": ranks, "max_steps": 7, "ema": 0.9}
    how: dict[str, Any] = {"keep_best": 1, "validation": partial(Measured, LOSSES)}
    for run in ("last", "best"):
        run_ranks(outcome, ranks, out=str(tmp_path / run), trainer=how | {"export": run}, **settings)
        assert names(tmp_path / run) == [5, 6, 7]
    last, best = (load_file(tmp_path / run / "weights" / "net.safetensors") for run in ("last", "best"))
    assert not torch.equal(last["enter.weight"], best["enter.weight"])
    reader = CheckpointReader(tmp_path / "best" / "checkpoints" / "step-00000005")
    for name in ("enter.weight", "conv.bias", "leave.weight"):
        stored = reader.read(f"average/net.{name}", 0, best[name].numel())
        assert torch.equal(best[name].flatten(), stored)
    assert weights.document_of(tmp_path / "best", "net")["extra"]["step"] == 5
    ended = [CheckpointReader(tmp_path / run / "checkpoints" / "step-00000007") for run in ("last", "best")]
    for key in sorted(ended[0].pieces):
        numel = torch.Size(ended[0].state["shapes"][key.split("/", 1)[1]]).numel()
        assert torch.equal(*(reader.read(key, 0, numel) for reader in ended))


class Spoil(L.Callback):
    """Damages a checkpoint when training is over, or puts it out of reach."""

    def __init__(self, folder: Path, reach: pytest.MonkeyPatch | None) -> None:
        self.folder, self.reach = folder, reach

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        file = self.folder / "rank-00000.safetensors"
        if self.reach is None:
            content = bytearray(file.read_bytes())
            content[-7] ^= 1
            file.write_bytes(content)
            return
        original = checkpoint.crc32

        def out_of_reach(path: Path) -> int:
            if path == file:
                raise PermissionError(13, "Permission denied", str(path))
            return original(path)

        self.reach.setattr(checkpoint, "crc32", out_of_reach)


@pytest.mark.parametrize(("keep_best", "exported", "left"), [(2, 3, [3, 6, 8]), (1, 8, [6, 8])])
def test_a_damaged_best_checkpoint_is_not_exported_and_the_next_best_that_is_there_is(
    keep_best: int, exported: int, left: list[int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    how: dict[str, Any] = {"keep_best": keep_best, "validation": partial(Measured, LOSSES), "export": "best"}
    with caplog.at_level("WARNING", logger="soratrain"):
        spoil = Spoil(tmp_path / "checkpoints" / "step-00000005", None)
        _, _, result = train(tmp_path, max_steps=8, trainer=how, callbacks=[spoil])
    assert weights.document_of(tmp_path, "net")["extra"]["step"] == exported
    assert "step-00000005: rank-00000.safetensors does not have the checksum" in caplog.text
    assert "; the next best is exported instead" in caplog.text
    assert names(tmp_path) == left  # what is damaged is not kept for its loss
    assert (result["best_step"], result["best_val_loss"]) == (exported, LOSSES[exported])


def test_a_best_checkpoint_that_cannot_be_read_now_is_exported_by_the_same_command_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"keep_best": 1, "validation": partial(Measured, LOSSES), "export": "best"}
    with monkeypatch.context() as patch:
        spoil = Spoil(tmp_path / "checkpoints" / "step-00000005", patch)
        with pytest.raises(UnreadableError, match=r"cannot be read now \(Permission denied\): .*give the same command"):
            train(tmp_path, max_steps=8, trainer=how, callbacks=[spoil])
    assert names(tmp_path) == [5, 6, 8] and not (tmp_path / "weights").exists()
    trainer, _, result = train(tmp_path, max_steps=8, trainer=how)
    assert weights.document_of(tmp_path, "net")["extra"]["step"] == 5
    assert trainer.global_step == 8 and names(tmp_path) == [5, 6, 8] and result["best_step"] == 5


def test_without_keep_best_what_is_measured_keeps_nothing(tmp_path: Path) -> None:
    _, _, result = train(tmp_path, max_steps=6, checkpoint_every=2, trainer={"validation": partial(Measured, LOSSES)})
    assert names(tmp_path) == [4, 6] and "best_step" not in result


@pytest.mark.parametrize("bad", [{"keep_best": -1}, {"max_shard_gb": 0}, {"export": "best"}])
def test_what_cannot_be_kept_or_written_is_refused(bad: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=next(iter(bad))):
        train(tmp_path, trainer=bad)


def test_what_a_killed_run_had_half_written_is_removed_and_said_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = tmp_path / "checkpoints" / ".step-00000009.part"
    part.mkdir(parents=True)
    (part / "rank-00000.safetensors").write_bytes(b"half")
    with caplog.at_level("INFO", logger="soratrain"):
        train(tmp_path, max_steps=3)
    assert not part.exists() and "what there was of step-00000009" in caplog.text


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_with_a_damaged_newest_all_ranks_go_on_from_the_one_before(ranks: int, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": "zero2" if ranks > 1 else "single", "ranks": ranks, "max_steps": 7}
    run_ranks(outcome, ranks, out=str(tmp_path / "whole"), **settings)
    run_ranks(outcome, ranks, out=str(tmp_path / "broken"), stop_at=5, **settings)
    newest = tmp_path / "broken" / "checkpoints" / "step-00000004" / f"rank-{ranks - 1:05d}.safetensors"
    content = bytearray(newest.read_bytes())
    content[-7] ^= 1
    newest.write_bytes(content)
    run_ranks(outcome, ranks, out=str(tmp_path / "broken"), **settings)
    assert steps(tmp_path / "whole") == steps(tmp_path / "broken")
    for out in ("whole", "broken"):
        assert names(tmp_path / out) == [6, 7]


def test_where_no_checkpoint_is_whole_the_run_does_not_start_over_by_itself(tmp_path: Path) -> None:
    train(tmp_path, max_steps=3)
    for folder in saved_checkpoints(tmp_path / "checkpoints"):
        (folder / "state.json").unlink()
    with pytest.raises(DataError, match="no checkpoint in .* is whole; put a copy there, or start with fresh=true"):
        train(tmp_path, max_steps=5)


def test_another_number_of_ranks_is_said_and_without_leave_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "ema": 0.9}
    run_ranks(outcome, 2, out=str(tmp_path), strategy="ddp", ranks=2, stop_at=3, **settings)
    with pytest.raises(ConfigError, match=r"trainer.elastic=false: .* written by 2 ranks and this run has 1; start"):
        train(tmp_path, trainer={"elastic": False}, **settings)
    with caplog.at_level("INFO", logger="soratrain"):
        train(tmp_path, **settings)
    assert "going on with 1 rank, after 2: the same samples in the same order" in caplog.text


def exported_in_parts(out: str, **settings: Any) -> int:
    """Train; return how many parameters were whole in memory at once, as the weights were written."""
    alive: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()
    assemble, write, found = export.assemble, export.Export.write, [0]

    def counted(*arguments: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, tensor in assemble(*arguments):
            alive.add(tensor)
            found[0] = max(found[0], len(alive))
            yield name, tensor
            del tensor

    def anew(*arguments: Any) -> None:
        alive.clear()  # what others have put together before
        found[0] = 0
        write(*arguments)

    export.assemble, export.Export.write = counted, anew  # type: ignore[assignment, method-assign]
    train(out, trainer={"max_shard_gb": 300e-9}, **settings)
    return found[0]


@pytest.mark.parametrize(
    ("strategy", "ranks"), [("single", 1), ("zero3", 2), pytest.param("zero2", 2, marks=pytest.mark.full)]
)
def test_weights_are_exported_parameter_by_parameter_into_files_of_a_size(
    strategy: str, ranks: int, tmp_path: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": ranks, "max_steps": 3, "ema": 0.9}
    run_ranks(outcome, ranks, out=str(tmp_path / "one"), **settings)
    most = run_ranks(exported_in_parts, ranks, out=str(tmp_path / "many"), **settings)
    assert 1 <= max(most) <= 2, f"{max(most)} whole parameters at once"
    files = weights.files(tmp_path / "many", "net")
    assert len(files) > 3 and all(len(load_file(file)) < 4 for file in files)
    state = {key: value for file in files for key, value in load_file(file).items()}
    one = load_file(tmp_path / "one" / "weights" / "net.safetensors")
    assert state.keys() == one.keys() == Net().state_dict().keys()
    assert all(torch.equal(state[key], one[key]) for key in one)


def start(out: Path, **settings: Any) -> subprocess.CompletedProcess[str]:
    """Train with as many processes as are asked for, as the command line would."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(HERE / "tiny_training.py"), json.dumps({"out": str(out), **settings})]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)  # none hangs


def said(done: subprocess.CompletedProcess[str]) -> str:
    """Return the one line that says why a run has ended."""
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    return line


@pytest.mark.full
@pytest.mark.parametrize("small_disk", [1], indirect=True)
@pytest.mark.parametrize(("strategy", "ranks", "beside"), [("single", 1, True), ("zero2", 2, True), ("ddp", 2, False)])
def test_a_full_disk_is_one_line_the_last_checkpoint_stands_and_with_room_the_command_goes_on(
    strategy: str, ranks: int, beside: bool, tmp_path: Path, small_disk: Path
) -> None:
    settings: dict[str, Any] = {
        "strategy": strategy, "ranks": ranks, "max_steps": 8, "width": 2500, "trainer": {"checkpoint_async": beside}
    }  # fmt: skip
    run_ranks(outcome, ranks, out=str(tmp_path / "whole"), **settings)
    line = said(start(small_disk / "run", **settings))
    assert "step-00000004 was not written (rank" in line and "No space left on device" in line
    assert "the one before stands" in line
    assert names(small_disk / "run") == [2] and not list((small_disk / "run" / "checkpoints").glob(".*"))
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    run_ranks(outcome, ranks, out=str(small_disk / "run"), **settings)
    assert steps(tmp_path / "whole") == steps(small_disk / "run")


@pytest.mark.full
@pytest.mark.parametrize(("strategy", "ranks"), [("single", 1), ("zero2", 2)])
def test_a_folder_that_cannot_be_written_and_a_checkpoint_of_another_model_are_one_line_for_all_ranks(
    strategy: str, ranks: int, small_disk: Path
) -> None:
    settings: dict[str, Any] = {"strategy": strategy, "ranks": ranks, "max_steps": 3}
    out = small_disk / "run"
    run_ranks(outcome, ranks, out=str(out), **settings)
    assert "another model: net.enter.bias is [10] there and [12] here" in said(start(out, width=12, **settings))
    other = 3 - ranks
    how = {"strategy": "single" if other == 1 else "zero2", "ranks": other, "max_steps": 5}
    assert "trainer.elastic=false" in said(start(out, trainer={"elastic": False}, **how))
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "cannot be written (Read-only file system)" in said(start(small_disk / "new", **settings))
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["single", "ddp", "zero1", "zero2", "zero3"])
def test_averages_go_on_whatever_strategy_and_number_of_ranks_comes_next(strategy: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"ema": 0.9, "max_steps": 7, "clip": 0.3}
    run_ranks(outcome, 1, out=str(tmp_path / "one"), **settings)
    ranks = 1 if strategy == "single" else 2
    for name, count, stop_at in (("zero2", 2, 3), (strategy, ranks, 5), ("zero1", 2, 0)):
        run_ranks(outcome, count, out=str(tmp_path / "two"), strategy=name, ranks=count, stop_at=stop_at, **settings)
    same_training(tmp_path / "one", tmp_path / "two")
    exported = [load_file(tmp_path / run / "weights" / "net.safetensors") for run in ("one", "two")]
    stored = latest_checkpoint(tmp_path / "one" / "checkpoints")
    average = load_file(stored / "rank-00000.safetensors")
    for name, value in exported[0].items():
        torch.testing.assert_close(value, exported[1][name], rtol=1e-4, atol=1e-5)
        if f"average/net.{name}" in average:
            assert torch.equal(value.flatten(), average[f"average/net.{name}"])
            assert not torch.equal(value.flatten(), average[f"weight/net.{name}"])
