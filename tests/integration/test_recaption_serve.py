"""stage=recaption engine=openai against a server of another maker, `transformers serve`, by the command's own words."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import free_port

from soratrain.data.caption_table import open_captions
from soratrain.run import prepare, run

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))

pytestmark = pytest.mark.full
SHAPES = [(40, 40, 9), (40, 56, 5), (40, 40, 1)] * 3
for needed in ("accelerate", "fastapi", "openai", "uvicorn"):
    pytest.importorskip(needed, reason="transformers serve needs pip install 'transformers[serving]'")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a tiny random model, and its name there."""
    import vlm_tiny

    folder, port = vlm_tiny.save(tmp_path_factory.mktemp("served") / "tiny-llava", chats=True), free_port()
    words = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    with open(folder.parent / "log", "wb") as log:
        server = subprocess.Popen(
            [*words, "--port", str(port), "--host", "127.0.0.1"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                told = (folder.parent / "log").read_text()[-2000:]
                assert server.poll() is None and time.monotonic() < deadline, told
                time.sleep(0.2)
        yield url, str(folder)
    finally:
        server.terminate()
        server.wait(30)


def described(url: str, folder: Path, concurrency: int, attempts: int) -> tuple[dict[str, Any], list[dict[str, str]]]:
    """Describe the clips of `folder` in two styles; return the job's figures, and the rows of its table."""
    import data_tiny

    out = folder / f"captions{concurrency}"
    words = ["stage=recaption", "engine=openai", f"engine.url={url}", "machine=laptop"]
    words += ["engine.max_tokens=16", f"engine.concurrency={concurrency}", f"stage.job.attempts={attempts}"]
    words += [f"inputs.shards={folder / 'shards'}", f"out={out}", "stage.job.workers=0", "engine.frames_per_second=8"]
    figures = run(*prepare([*words, "engine.max_frames=2", "stage.job.styles=[short,tags]"]))
    table = open_captions(out)
    return figures, [row for number in range(len(SHAPES)) for row in table.get(data_tiny.key(number))]


def test_every_clip_is_described_however_requests_overtake_each_other(served: tuple[str, str], tmp_path: Path) -> None:
    import data_tiny

    url, model = served
    data_tiny.write_clips(tmp_path / "shards", SHAPES)
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    once, rows = described(url, tmp_path, 1, 0)
    again, more = described(url, tmp_path, 8, 2)
    assert once["captions"] == again["captions"] == len(rows) == len(more) == 2 * len(SHAPES)
    assert once["unreadable"] == again["unreadable"] == once["missing"] == again["missing"] == 0
    own = [row for row in rows if row["model"] == model]
    assert own and all(row in more for row in own)  # what was taken at once is the same, and its clip's
    assert len({row["text"] for row in own}) > len(own) / 2
    assert len(own) < len(rows) and once["rejected"] == once["originals"] == len(rows) - len(own)
    assert sum(row["model"] == model for row in more) > len(own)  # what was not, came when it was asked again
