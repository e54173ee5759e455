"""What checkpoints on disk promise, without any training."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from soratrain.distributed import checkpoint as module
from soratrain.distributed.checkpoint import (
    CheckpointReader,
    check,
    folder_of,
    latest_checkpoint,
    read_state,
    save_checkpoint,
    saved_checkpoints,
)
from soratrain.errors import DataError

WHOLE = torch.arange(10.0)


def write(root: Path, step: int = 1, **state: object) -> Path:
    folder = folder_of(root, step)
    save_checkpoint(folder, {"weight/a": WHOLE}, {"weight/a": 0}, {"global_step": step, **state})
    return folder


def in_two_files(root: Path) -> Path:
    """Return a checkpoint as two ranks would leave it: numbers 0 to 5 in one file, 6 to 9 in the other."""
    import json

    folder = folder_of(root, 1)
    folder.mkdir()
    files = {}
    for rank, (start, part) in enumerate([(0, WHOLE[:6]), (6, WHOLE[6:])]):
        file = folder / f"rank-{rank:05d}.safetensors"
        save_file({"weight/a": part.clone()}, str(file))
        files[file.name] = {"bytes": file.stat().st_size, "crc32": module.crc32(file), "starts": {"weight/a": start}}
    (folder / "state.json").write_text(json.dumps({"format": 1, "files": files}))
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


def test_a_failed_write_leaves_the_last_good_one_and_nothing_half_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = write(tmp_path, 1)

    def full(tensors: dict[str, torch.Tensor], path: str) -> None:
        Path(path).write_bytes(b"half")
        save_file(tensors, str(Path(path) / "no folder"))  # fails with the library's own error, as a full disk does

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(DataError, match="step-00000002 was not written .*rank 0.*free space"):
        write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [good.name]
    assert latest_checkpoint(tmp_path) == good


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


def test_another_format_is_refused_and_no_folder_means_no_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "state.json").write_text((folder / "state.json").read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(DataError, match="format 9; this version reads 1"):
        read_state(folder)
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "nowhere") is None
