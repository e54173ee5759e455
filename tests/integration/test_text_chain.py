"""The chain on frozen text encoders that transformers has saved, by the commands that people type."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest
from test_published_chain import FORMS, UNIT, call, world

__all__ = ["world"]

STEPS = "trainer.max_steps=2"


def losses(folder: Path) -> list[float]:
    with (folder / "metrics.csv").open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines) if row["loss"]]


@pytest.mark.full
@pytest.mark.parametrize("kind", ["t5", "clip"])
def test_a_dit_is_trained_and_sampled_on_a_frozen_text_encoder(kind: str, world: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(UNIT))
    import hf_tiny
    import published

    published.save("wan", tmp_path / "vae")
    folder = hf_tiny.save(kind, tmp_path / "encoder")
    common = [*FORMS["wan"], f"inputs.vae={tmp_path}", "machine=laptop", "inputs.captions=null", "trainer.log_every=1"]
    own = ["text=hf", f"text.folder={folder}", "text.dim=16"]
    said = call(world, "stage=dit", STEPS, *common, *own, f"run={kind}")  # which makes latents and features first
    assert f"text features of captions: stored, of {folder}" in said
    outputs = world / "outputs"
    latents = outputs / kind / "encode" / "base"
    assert json.loads((latents / "dataset.json").read_text())["text"]["folder"] == str(folder)

    call(
        world, "stage=sample", "sampler.steps=2", *common, f"run={kind}", "prompt=三只猫 clip", "size=32x32", "frames=5"
    )
    assert len(list((outputs / kind / "sample" / "base" / "samples").glob("*.mp4"))) == 1

    at = f"inputs.latents={latents}"
    said = call(world, "stage=dit", STEPS, *common, *own, "text.features=live", at, f"run={kind}-live")
    assert f"text features of captions: live, by {folder}" in said
    stored, live = losses(outputs / kind / "dit" / "base"), losses(outputs / f"{kind}-live" / "dit" / "base")
    assert stored == pytest.approx(live, rel=1e-2) and len(stored) == 2

    other = hf_tiny.save(kind, tmp_path / "other", seed=1)
    wrong = ["text=hf", f"text.folder={other}", "text.dim=16"]
    said = call(world, "stage=dit", STEPS, *common, *wrong, at, f"run={kind}-wrong", code=2)
    assert "holds text features of another encoder" in said and "text.features=live" in said
    assert not any((outputs / f"{kind}-wrong").rglob("config.yaml"))  # the mended command may have the folder
    said = call(world, "stage=dit", STEPS, *common, *own, "text.dim=8", at, f"run={kind}-narrow", code=2)
    assert "set text.dim=16" in said

    hf_tiny.save(kind, folder, seed=2)  # another in its place
    said = call(world, "stage=sample", *common, f"run={kind}", "prompt=clip", "size=32x32", "frames=5", code=2)
    assert "trained with another text encoder" in said
