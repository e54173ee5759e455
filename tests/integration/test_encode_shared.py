"""Processes that encode each long clip together make what one does, and stop together."""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks

UNIT = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(UNIT))
# frames, height, width: of three clips each is cut up, in time or in width; the others are too small
SIZES = [(97, 16, 16), (1, 32, 32), (1, 32, 32), (5, 32, 256), (9, 16, 16), (97, 16, 16)]
LARGEST = 8000  # pixels at once
pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with shards and a VAE, and in `one` what one process makes of them."""
    from test_encode import write_shards, write_vae

    folder = tmp_path_factory.mktemp("encode")
    write_shards(folder / "shards", sizes=SIZES)
    write_vae(folder / "vae")
    run_ranks(encode, 1, place=str(folder), out="one", sequence=1)
    return folder


def encode(place: str, out: str, sequence: int, fault: str = "", by: int = 0, workers: int = 0) -> dict[str, Any]:
    """Encode; return the result, and the pixels of the clips that this process has encoded, shard by shard or so."""
    from test_encode import job

    from soratrain.data.shards import ShardWriter
    from soratrain.errors import UserError
    from soratrain.stages.encoding import ClipEncoder

    pixels: list[int] = []
    call, own = ClipEncoder.__call__, int(os.environ.get("LOCAL_RANK", 0)) == by

    def counted(self: Any, vae: Any, videos: Any, *rest: Any) -> Any:
        pixels.extend(video[..., 0].size for video in videos)
        if len(pixels) > 2 and own and fault == "raise":
            raise UserError("it cannot be encoded")
        if len(pixels) > 2 and own and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return call(self, vae, videos, *rest)

    def full(self: Any) -> None:
        raise OSError(28, "No space left on device", out)

    ClipEncoder.__call__ = counted  # type: ignore[method-assign]
    if fault == "full":
        ShardWriter.close = full  # type: ignore[method-assign]
    options = {"pixels_per_batch": LARGEST, "dtype": "fp16", "max_bytes": 1 << 14, "workers": workers}
    return {**job(Path(place), out=str(Path(place) / out), sequence=sequence, **options)(), "pixels": sum(pixels)}


def same(one: Path, other: Path) -> int:
    """See that two folders hold the same but for rounding; return how many numbers differ at all."""
    from test_encode import stored

    notes = [json.loads((folder / "dataset.json").read_text()) for folder in (one, other)]
    assert notes[0] == notes[1] and notes[0]["complete"]
    assert [path.name for path in sorted(one.rglob("*"))] == [path.name for path in sorted(other.rglob("*"))]
    left, right = stored(one), stored(other)
    assert list(left) == list(right) and len(left) == len(SIZES)
    differing = 0
    for key, (header, tensors, row) in left.items():
        again, found, place = right[key]
        assert header == again and replace(row, crc32=0) == replace(place, crc32=0)
        assert tensors.keys() == found.keys()
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor.float(), found[name].float(), rtol=0, atol=4e-3)
            differing += int((tensor != found[name]).sum())
    return differing


@pytest.mark.parametrize(("ranks", "workers"), [(2, 0), (4, 1)])
def test_processes_that_share_their_clips_make_the_files_of_one(ranks: int, workers: int, place: Path) -> None:
    (alone,) = run_ranks(encode, 1, place=str(place), out=f"alone{ranks}", sequence=1)
    found = run_ranks(encode, ranks, place=str(place), out=f"shared{ranks}", sequence=2, workers=workers)
    assert {each["clips"] for each in found} == {len(SIZES)}
    same(place / "one", place / f"shared{ranks}")
    total = sum(frames * height * width for frames, height, width in SIZES)
    assert alone["pixels"] == total
    assert max(each["pixels"] for each in found) < (0.8 if ranks == 2 else 0.5) * total


@pytest.mark.parametrize(("fault", "by"), [("raise", 0), ("raise", 1), ("kill", 1), ("full", 0)])
def test_what_fails_on_one_ends_its_group_and_the_same_command_goes_on(fault: str, by: int, place: Path) -> None:
    said = {
        "raise": [f"rank {by}: UserError: it cannot", f"rank {1 - by}: ElsewhereError: rank {by}: it cannot"],
        "kill": ["rank 0: DataError: another process of this job has died", "rank 1 died with exit code -9"],
        "full": ["rank 0: OSError: .*No space", "rank 1: ElsewhereError: rank 0: .*No space"],
    }
    out = f"{fault}{by}"
    with pytest.raises(RuntimeError) as failed:
        run_ranks(encode, 2, timeout=60, place=str(place), out=out, sequence=2, fault=fault, by=by)
    for words in said[fault]:
        assert re.search(words, str(failed.value)), str(failed.value)
    assert not json.loads((place / out / "dataset.json").read_text())["complete"]
    run_ranks(encode, 2, place=str(place), out=out, sequence=2)
    same(place / "one", place / out)
