"""Processes that draw a clip together draw what one does, and stop together."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import run_ranks

UNIT = Path(__file__).parents[1] / "unit"
sys.path.insert(0, str(UNIT))


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a chain whose nets are small and at random, and a clip to begin from."""
    from dit_stage_tiny import write_chain
    from sample_chain import clip

    from soratrain.media import write_video

    folder = tmp_path_factory.mktemp("chain")
    write_chain(folder)
    write_video(folder / "a.mp4", clip(9, 0), 8)
    return folder


def draw(chain: str, out: str, sequence: int, rolled: bool = False, full_disk: bool = False) -> dict[str, Any]:
    """Draw three clips, two of them in one batch, or one that goes on from another in windows."""
    from soratrain.diffusion.sampler import Sampler
    from soratrain.stages import sample_files
    from soratrain.stages.sample import Sample
    from soratrain.stages.sample_joined import Extend
    from soratrain.stages.sample_tasks import T2V

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device", out)

    if full_disk:
        sample_files.write_sample = full
    task = Extend(video=str(Path(chain) / "a.mp4"), by=16) if rolled else T2V()
    more: dict[str, Any] = {"frames": 9} if rolled else {"size": "48x32", "fps": 8.0, "samples": 3, "frames": 9}
    job = Sample(
        out=out, vae=chain, dit=chain, task=task, prompt="a cat", area="48x32", batch=2, seed=0, sequence=sequence,
        sampler=Sampler(steps=2, guidance_scale=2.0), **{"size": None, "fps": None, **more},
    )  # fmt: skip
    return job()


def frames(folder: Path) -> dict[str, np.ndarray]:
    """Return the strips of all samples in a folder."""
    from PIL import Image

    return {path.name: np.asarray(Image.open(path)).astype(int) for path in sorted(folder.glob("samples/*.png"))}


@pytest.mark.parametrize("rolled", [False, True], ids=["batches", "windows"])
def test_two_processes_draw_the_clips_of_one(rolled: bool, chain: Path, tmp_path: Path) -> None:
    outs = [str(tmp_path / name) for name in ("one", "two")]
    (alone,) = run_ranks(draw, 1, chain=str(chain), out=outs[0], sequence=1, rolled=rolled)
    both = run_ranks(draw, 2, chain=str(chain), out=outs[1], sequence=2, rolled=rolled)
    assert [found["drawn"] for found in both] == [alone["drawn"]] * 2
    one, two = (frames(Path(out)) for out in outs)
    assert one.keys() == two.keys() and len(one) == (1 if rolled else 3)
    for name, picture in one.items():
        assert picture.std() > 5 and np.abs(picture - two[name]).max() <= 2
        notes = [json.loads((Path(out) / "samples" / name).with_suffix(".json").read_text()) for out in outs]
        assert notes[0] == notes[1]


@pytest.mark.full
def test_two_groups_share_the_batches(chain: Path, tmp_path: Path) -> None:
    (alone,) = run_ranks(draw, 1, chain=str(chain), out=str(tmp_path / "one"), sequence=1)
    run_ranks(draw, 4, chain=str(chain), out=str(tmp_path / "four"), sequence=2)
    one, four = frames(tmp_path / "one"), frames(tmp_path / "four")
    assert one.keys() == four.keys() and len(one) == alone["drawn"] == 3
    assert max(np.abs(picture - four[name]).max() for name, picture in one.items()) <= 2


def test_what_cannot_be_written_ends_all_that_draw_together(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError) as failed:
        run_ranks(draw, 2, timeout=60, chain=str(chain), out=str(tmp_path / "out"), sequence=2, full_disk=True)
    assert "rank 0: OSError" in str(failed.value) and "ElsewhereError: rank 0: [Errno 28]" in str(failed.value)


def test_processes_that_make_no_whole_groups_are_refused(chain: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RuntimeError, match=r"ConfigError: parallel.sequence=2: 1 ranks .* use one of 1, or other ranks"
    ):
        run_ranks(draw, 1, chain=str(chain), out=str(tmp_path / "out"), sequence=2)
