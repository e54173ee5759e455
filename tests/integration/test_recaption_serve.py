"""engine=openai against a server of another maker: `transformers serve`, where its needs are installed.

pip install 'transformers[serving]'
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ranks import free_port

pytestmark = pytest.mark.full
UNIT = Path(__file__).parents[1] / "unit"
for needed in ("fastapi", "uvicorn", "openai"):
    pytest.importorskip(needed, reason="transformers serve needs transformers[serving]")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a tiny random model, and its name there."""
    sys.path.insert(0, str(UNIT))
    import vlm_tiny

    folder, port = vlm_tiny.save(tmp_path_factory.mktemp("served") / "tiny-llava"), free_port()
    words = [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", str(folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    with open(folder.parent / "log", "wb") as log:
        server = subprocess.Popen(
            [*words, "--port", str(port), "--host", "127.0.0.1"], env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
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


def test_answers_that_overtake_each_other_stay_with_their_clips(served: tuple[str, str]) -> None:
    import torch

    from soratrain.captions.engine import Question, Seen
    from soratrain.captions.openai import OpenAIEngine

    url, model = served
    rng = np.random.default_rng(0)
    clips = [Seen(f"{n:032x}", rng.integers(0, 255, (1 + n % 3, 40, 40, 3), dtype=np.uint8), 8.0, 9) for n in range(10)]
    prompts = {"short": "Be brief.", "tags": "Tags!"}
    questions = [Question(place, style, None) for place in range(10) for style in prompts]
    said = []
    for concurrency in (1, 8):
        engine = OpenAIEngine(url=url, concurrency=concurrency, max_tokens=12)
        engine.open(torch.device("cpu"), False, prompts)
        engine.try_out()
        assert engine.model == model
        said.append(engine.ask(engine.look(clips), questions))
    assert not [answer.failure for answer in said[0] + said[1] if answer.failure]
    assert said[0] == said[1]
    assert len({answer.text for answer in said[0]}) > 5
    assert any(answer.cut for answer in said[0])
