"""What checkpoints promise where something is wrong that is no damage: memory, rights, another version."""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from test_checkpoint import save, write

from soratrain.callbacks.checkpoint import Checkpoint
from soratrain.distributed import image, saving
from soratrain.distributed.checkpoint import (
    FORMAT,
    UnreadableError,
    check,
    folder_of,
    latest_checkpoint,
    saved_checkpoints,
    with_checksum,
)
from soratrain.distributed.saving import Saver
from soratrain.errors import DataError
from soratrain.models import tensor_file


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (SafetensorError("InvalidHeader"), "rank 0: SafetensorError: InvalidHeader"),
        (MemoryError(), "rank 0: out of memory"),
        (ValueError("of\ntwo lines"), "rank 0: ValueError: of two lines"),
    ],
)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("where", ["write", "sync"])
def test_whatever_goes_wrong_is_one_line_and_the_last_good_one_stands(
    error: Exception, said: str, beside: bool, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1)

    def wrong(*_: object) -> None:
        raise error

    monkeypatch.setattr(*((tensor_file, "write") if where == "write" else (saving, "sync")), wrong)
    saver = Saver(beside=beside)
    saver.open()
    with pytest.raises(DataError) as refused:
        save(saver, tmp_path, 2)
        saver.wait()
    assert f"step-00000002 was not written ({said}); the one before stands" in str(refused.value)
    assert "\n" not in str(refused.value) and [path.name for path in tmp_path.iterdir()] == [good.name]
    check(good)


def test_one_that_is_whole_stands_whatever_becomes_of_older_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    with caplog.at_level(logging.WARNING):
        folder = save(Saver(beside=False, after=wrong), tmp_path, 1)
    check(folder)
    assert "older checkpoints were not removed (rank 0: Permission denied)" in caplog.text


def test_where_there_is_no_memory_for_a_copy_training_waits_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def nothing_left(*_: object) -> None:
        raise RuntimeError("not enough memory: you tried to allocate 40 bytes")

    monkeypatch.setattr(saving.Image, "take", nothing_left)
    saver = Saver()
    saver.open()
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            save(saver, tmp_path, step)
            assert saver.under_way is None and latest_checkpoint(tmp_path) == folder_of(tmp_path, step)
    assert caplog.text.count("training waits: there was no memory for a copy (rank 0: not enough memory") == 1


def test_another_fault_of_a_copy_is_not_said_to_be_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (4)")

    monkeypatch.setattr(saving.Image, "take", wrong)
    saver = Saver()
    saver.open()
    with pytest.raises(RuntimeError, match="must match the size"):
        save(saver, tmp_path, 1)
    assert saver.beside


def test_memory_that_cannot_be_page_locked_is_used_as_it_is_and_that_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    answers, freed = [0, 2, 2], []
    card = SimpleNamespace(
        cudaHostRegister=lambda *_: answers.pop(0), cudaHostUnregister=lambda address: freed.append(address)
    )
    monkeypatch.setattr(torch.cuda, "cudart", lambda: card)
    monkeypatch.setattr(image, "cards", lambda tensors: {torch.device("cpu")})
    monkeypatch.setattr(image, "events_on", lambda devices: [])
    taken = image.Image()
    with caplog.at_level(logging.WARNING):
        for count, locked in ((10, True), (11, False), (12, False)):
            layout = tensor_file.Layout.of({"a": tensor_file.Form(torch.float32, (count,))})
            (copy,) = taken.take(layout, {"a": torch.arange(float(count))})
            assert taken.locked is locked and bytes(copy) == torch.arange(float(count)).numpy().tobytes()
    taken.free()
    assert len(freed) == 1 and caplog.text.count("could not be page-locked (see ulimit -l)") == 1


@pytest.mark.parametrize("name", ["state.json", "rank-00000.safetensors"])
def test_one_that_cannot_be_read_now_is_neither_passed_over_nor_taken_for_damaged(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    opened = Path.open

    def out_of_reach(path: Path, *rest: Any, **more: Any) -> Any:
        if path == newest / name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return opened(path, *rest, **more)

    monkeypatch.setattr(Path, "open", out_of_reach)
    said = rf"step-00000002: {name} cannot be read now \(Input/output error\): see to that .* or move the folder away"
    with pytest.raises(UnreadableError, match=said) as refused:
        latest_checkpoint(tmp_path)
    assert "\n" not in str(refused.value) and refused.value.alike
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path) == newest


def test_one_of_another_version_is_not_taken_for_damaged(tmp_path: Path) -> None:
    write(tmp_path, 1)
    newest = write(tmp_path, 2)
    (newest / "state.json").write_text(with_checksum({"format": FORMAT + 1, "files": {}}))
    with pytest.raises(UnreadableError, match=f"has format {FORMAT + 1}; this version reads {FORMAT}: see to that"):
        latest_checkpoint(tmp_path)


def test_what_may_be_the_best_and_cannot_be_read_now_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in range(1, 5):
        write(tmp_path, step, score=step / 10)
    opened = Path.open

    def out_of_reach(path: Path, *rest: Any, **more: Any) -> Any:
        if path == folder_of(tmp_path, 1) / "state.json":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return opened(path, *rest, **more)

    callback = Checkpoint(tmp_path, every=1, keep=1, keep_best=1)
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Path, "open", out_of_reach)
        callback.on_train_start(SimpleNamespace(global_step=4, is_global_zero=True), None)
    assert "step-00000001: state.json cannot be read now (Permission denied); it stays where it is" in caplog.text
    assert callback.best() == [2]
    callback.tidy(folder_of(tmp_path, 4))
    assert saved_checkpoints(tmp_path) == [folder_of(tmp_path, step) for step in (1, 2, 4)]
