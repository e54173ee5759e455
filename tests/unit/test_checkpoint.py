"""What checkpoints on disk promise, without any training."""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from soratrain.distributed import saving
from soratrain.distributed.checkpoint import (
    FORMAT,
    CheckpointReader,
    check,
    crc32,
    folder_of,
    latest_checkpoint,
    read_state,
    remove_parts,
    saved_checkpoints,
    with_checksum,
)
from soratrain.distributed.saving import Saver
from soratrain.errors import DataError
from soratrain.models import tensor_file

WHOLE = torch.arange(10.0)


def save(saver: Saver, root: Path, step: int = 1, **state: object) -> Path:
    folder = folder_of(root, step)
    saver.save(folder, {"weight/a": WHOLE}, {"weight/a": 0}, {"global_step": step, **state})
    return folder


def write(root: Path, step: int = 1, **state: object) -> Path:
    return save(Saver(beside=False), root, step, **state)


def in_two_files(root: Path) -> Path:
    """Return a checkpoint as two ranks would leave it: numbers 0 to 5 in one file, 6 to 9 in the other."""
    folder = folder_of(root, 1)
    folder.mkdir()
    files = {}
    for rank, (start, part) in enumerate([(0, WHOLE[:6]), (6, WHOLE[6:])]):
        file = folder / f"rank-{rank:05d}.safetensors"
        save_file({"weight/a": part.clone()}, str(file))
        files[file.name] = {"bytes": file.stat().st_size, "crc32": crc32(file), "starts": {"weight/a": start}}
    (folder / "state.json").write_text(with_checksum({"format": FORMAT, "files": files}))
    return folder


def test_what_is_written_is_read_and_is_whole(tmp_path: Path) -> None:
    folder = write(tmp_path, note="here")
    check(folder)
    assert read_state(folder)["note"] == "here"
    assert torch.equal(CheckpointReader(folder).read("weight/a", 0, 10), WHOLE)


@pytest.mark.parametrize(("start", "numel"), [(0, 10), (0, 6), (6, 4), (2, 3), (4, 5), (9, 1)])
def test_any_slice_can_be_read_whichever_ranks_wrote_it(start: int, numel: int, tmp_path: Path) -> None:
    reader = CheckpointReader(in_two_files(tmp_path))
    assert torch.equal(reader.read("weight/a", start, numel), WHOLE[start : start + numel])


def test_what_is_not_there_is_an_error_that_names_it(tmp_path: Path) -> None:
    reader = CheckpointReader(in_two_files(tmp_path))
    with pytest.raises(DataError, match="lacks weight/b"):
        reader.read("weight/b", 0, 1)
    with pytest.raises(DataError, match="lacks weight/a, numbers 8 to 12"):
        reader.read("weight/a", 8, 4)


@pytest.mark.parametrize("beside", [False, True])
def test_a_full_disk_leaves_the_last_good_one_and_nothing_half_written(
    beside: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1)

    def full(path: Path, header: bytes, *_: object) -> None:
        path.write_bytes(header)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(tensor_file, "write", full)
    saver = Saver(beside=beside)
    saver.open()
    with pytest.raises(DataError, match=r"step-00000002 was not written \(rank 0: No space left.*stands"):
        save(saver, tmp_path, 2)
        while saver.under_way:
            saver.poll()
    assert sorted(path.name for path in tmp_path.iterdir()) == [good.name]
    assert latest_checkpoint(tmp_path) == good
    monkeypatch.undo()
    save(saver, tmp_path, 2)
    saver.wait()
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_what_is_written_beside_training_is_what_would_have_been_written_at_once(tmp_path: Path) -> None:
    tensors = {
        "weight/b": torch.randn(3000),
        "weight/a": torch.randn(5).bfloat16(),
        "buffer/count": torch.tensor([7]),
        "buffer/flag": torch.tensor([True]),
        "weight/none": torch.zeros(0),
    }
    state = {"global_step": 1, "list": [1]}
    for name, beside in (("at once", False), ("beside", True)):
        saver = Saver(beside=beside)
        saver.open()
        changing, values = {key: value.clone() for key, value in tensors.items()}, {**state, "list": [1]}
        saver.save(tmp_path / name, changing, dict.fromkeys(tensors, 0), values)
        for value in changing.values():
            value.zero_()  # as the next step does
        values["list"].append(2)
        assert bool(saver.under_way) is beside
        saver.wait()
    for file in ("rank-00000.safetensors", "state.json"):
        assert (tmp_path / "at once" / file).read_bytes() == (tmp_path / "beside" / file).read_bytes()
    save_file(tensors, str(tmp_path / "theirs"))  # the format's own library
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "beside" / "rank-00000.safetensors").read_bytes()


def test_the_next_save_waits_for_the_one_under_way_and_memory_is_taken_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held, at_work = threading.Event(), []
    original = tensor_file.write

    def slow(*args: object) -> tuple[int, int]:
        at_work.append(threading.current_thread())
        assert held.wait(10)
        return original(*args)

    monkeypatch.setattr(tensor_file, "write", slow)
    saver = Saver()
    saver.open()
    save(saver, tmp_path, 1)
    saver.poll()
    assert saver.under_way and latest_checkpoint(tmp_path) is None
    memory = saver.image.memory
    threading.Timer(0.2, held.set).start()
    save(saver, tmp_path, 2)
    assert latest_checkpoint(tmp_path).name >= "step-00000001" and saver.image.memory is memory
    saver.wait()
    assert threading.main_thread() not in at_work and len(set(at_work)) == 2
    saver.close()
    assert saver.image.memory is None


def test_where_a_copy_does_not_fit_training_waits_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(saving, "available", lambda device: 60)
    saver = Saver()
    saver.open()
    with caplog.at_level(logging.WARNING):
        save(saver, tmp_path, 1)
        assert saver.under_way is None
        save(saver, tmp_path, 2)
    assert caplog.text.count("training waits: a copy of 40 B would take more than half of the 60 B") == 1
    assert latest_checkpoint(tmp_path).name == "step-00000002"


def test_what_is_given_up_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, original = threading.Event(), tensor_file.write

    def wait_for_it(path: Path, header: bytes, pieces: object, stop: Callable[[], bool]) -> tuple[int, int]:
        begun.set()
        while not stop():
            time.sleep(0.01)
        return original(path, header, pieces, stop)

    monkeypatch.setattr(tensor_file, "write", wait_for_it)
    saver = Saver()
    saver.open()
    save(saver, tmp_path, 1)
    assert begun.wait(10)
    saver.give_up()
    with pytest.raises(DataError, match="given up"):
        saver.wait()
    assert not list(tmp_path.iterdir())


def test_a_place_where_no_folder_can_be_made_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="step-00000001 was not written .*rank 0"):
        write(tmp_path / "file", 1)


def test_a_write_that_was_killed_is_not_seen_and_does_not_hinder_the_next(tmp_path: Path) -> None:
    good = write(tmp_path, 1)
    leftover = tmp_path / ".step-00000002.part"
    leftover.mkdir()
    (leftover / "rank-00000.safetensors").write_bytes(b"half")
    assert saved_checkpoints(tmp_path) == [good]
    again = write(tmp_path, 2)
    assert latest_checkpoint(tmp_path) == again and not leftover.exists()
    leftover.mkdir()
    assert remove_parts(tmp_path) == ["step-00000002"] and saved_checkpoints(tmp_path) == [good, again]


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def flip(place: int, file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 2
    file.write_bytes(content)


def another_start(file: Path) -> None:
    text = file.read_text()
    assert '"weight/a": 6' in text
    file.write_text(text.replace('"weight/a": 6', '"weight/a": 4'))


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("rank-00001.safetensors", cut_short, "rank-00001.safetensors is missing or cut short"),
        ("rank-00001.safetensors", partial(flip, -3), "rank-00001.safetensors does not have the checksum"),
        ("rank-00000.safetensors", partial(flip, 20), "rank-00000.safetensors does not have the checksum"),
        ("rank-00000.safetensors", Path.unlink, "rank-00000.safetensors is missing or cut short"),
        ("state.json", Path.unlink, "no readable state.json"),
        ("state.json", cut_short, "no readable state.json"),
        ("state.json", another_start, "state.json does not have the checksum"),
        ("state.json", partial(flip, 0), "no readable state.json"),
        ("state.json", lambda file: file.write_text("[]"), "no readable state.json"),
        ("state.json", lambda file: file.write_text(""), "no readable state.json"),
    ],
)
def test_every_kind_of_damage_is_found_and_the_one_before_is_used(
    file: str, damage: Callable[[Path], object], said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newest, before = in_two_files(tmp_path), write(tmp_path, 0)
    assert latest_checkpoint(tmp_path) == newest
    damage(newest / file)
    with caplog.at_level(logging.WARNING):
        assert latest_checkpoint(tmp_path) == before
    assert f"checkpoint {newest}" in caplog.text and said in caplog.text and "left out" in caplog.text
    with pytest.raises(DataError, match=said):
        check(newest)


def test_another_format_is_refused_and_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace(f'"format": {FORMAT}', '"format": 9')
    )
    with pytest.raises(DataError, match=f"format 9; this version reads {FORMAT}"):
        read_state(folder)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
