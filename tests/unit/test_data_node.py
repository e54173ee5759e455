"""Promises of what a node's processes share: made once, mapped by all, never stale, never half there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import numpy as np
import pytest
from data_tiny import write_latents
from loading import cached

from soratrain.data import node
from soratrain.data.keys import hashed, repeated
from soratrain.data.node import mapped, new_array, shared
from soratrain.data.reading import read_manifest
from soratrain.errors import DataError


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(node.VARIABLE, str(tmp_path / "node"))
    return tmp_path / "node"


def _ask(log: str) -> None:
    def make(new: Path) -> None:
        with open(log, "a") as file:
            file.write("made\n")
        time.sleep(0.3)
        new_array(new / "x.npy", np.int64, 3)[:] = 7

    assert mapped(shared("thing", make) / "x.npy").tolist() == [7, 7, 7]


def test_of_many_processes_one_makes_and_the_others_wait(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    asking = [context.Process(target=_ask, args=(str(tmp_path / "log"),)) for _ in range(4)]
    for process in asking:
        process.start()
    for process in asking:
        process.join(30)
    assert [process.exitcode for process in asking] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_fails_leaves_nothing_and_is_tried_again(own: Path) -> None:
    def full(new: Path) -> None:
        (new / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"cannot be written: No space left on device; set SORATRAIN_NODE_DIR"):
        shared("thing", full)
    assert not [path for path in own.iterdir() if path.is_dir()]
    assert shared("thing", lambda new: None).is_dir()


def test_what_a_killed_process_of_the_same_number_left_is_in_nobodys_way(own: Path) -> None:
    (own / f".thing.{os.getpid()}").mkdir(parents=True)
    (own / f".thing.{os.getpid()}" / "half.npy").write_bytes(b"half")
    assert list(shared("thing", lambda new: None).iterdir()) == []


def test_room_for_an_array_is_set_aside_before_it_is_filled(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk found to be full while a mapped page is written would kill the process, without a word."""

    def make(new: Path) -> None:
        new_array(new / "x.npy", np.int64, 1 << 17)
        state = (new / "x.npy").stat()
        assert state.st_blocks * 512 >= state.st_size

    shared("thing", make)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(node.os, "posix_fallocate", full)
    with pytest.raises(DataError, match="No space left on device"):
        shared("other", lambda new: make(new))
    assert not [path for path in own.iterdir() if "other" in path.name and path.suffix != ".lock"]


def test_a_folder_that_cannot_be_written_says_so_even_before_anything_is_made(own: Path) -> None:
    (own / "thing.lock").mkdir(parents=True)  # stands for a disk that is read-only or out of files
    with pytest.raises(DataError, match=f"cannot be written.*{node.VARIABLE}"):
        shared("thing", lambda new: None)


def test_what_another_process_tidies_at_the_same_time_is_no_error(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own.mkdir()
    monkeypatch.setattr(Path, "iterdir", lambda folder: iter([folder / "gone"]))
    assert shared("thing", lambda new: None).is_dir()


def test_what_nobody_has_opened_for_a_month_goes(own: Path) -> None:
    old, used = shared("old", lambda new: None), shared("used", lambda new: None)
    os.utime(old, (0, 0))
    shared("new", lambda new: None)
    assert not old.exists() and used.exists()


def test_a_folder_that_cannot_be_made_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(node.VARIABLE, str(tmp_path / "file" / "node"))
    with pytest.raises(DataError, match="cannot be made.*set SORATRAIN_NODE_DIR"):
        shared("thing", lambda new: None)


def test_a_loader_process_is_handed_a_place_and_not_the_tables(tmp_path: Path) -> None:
    small = str(write_latents(tmp_path / "small", [(32, 32, 9)] * 10))
    large = str(write_latents(tmp_path / "large", [(32, 32, 9)] * 2000))
    sizes = [len(pickle.dumps(cached(folder).items())) for folder in (small, large)]
    assert sizes[1] < sizes[0] + 200
    copy = pickle.loads(pickle.dumps(cached(large).items()))
    assert copy[3].keys == cached(large).items()[3].keys


def test_a_manifest_written_anew_is_read_anew(tmp_path: Path, own: Path) -> None:
    folder = write_latents(tmp_path / "latents", [(32, 32, 9)] * 4)
    first = read_manifest(folder)
    assert read_manifest(folder).home == first.home
    write_latents(folder, [(32, 32, 9)] * 5)
    assert len(read_manifest(folder)) == 5 and len(first) == 4


def test_a_hash_tells_keys_apart_and_a_repeated_key_is_found() -> None:
    keys = np.array([f"{number:032x}" for number in range(50_000)], dtype="S32")
    assert len(np.unique(hashed(keys))) == len(keys) and repeated(keys) is None
    assert repeated(np.append(keys, keys[777])) == f"{777:032x}"
