"""A DiT trained on somebody else's VAE, by the commands that people type."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[1] / "unit"
FORMS = {
    "wan": ["vae=wan", "vae.latent_channels=4"],
    "wan22": ["vae=wan22", "vae.latent_channels=6", "dit.patch=[1,1,1]"],
    "cogvideox": ["vae=cogvideox", "vae.latent_channels=4"],
}


def call(folder: Path, *words: str, code: int = 0, module: str = "soratrain") -> str:
    """Run a command in `folder`, check its exit code, and return what it said."""
    command = [sys.executable, "-m", module, *words]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    call(folder, "input=world", "output=data/world", "world.clips=12", module="data_prep")
    return folder


@pytest.mark.full
@pytest.mark.parametrize("form", FORMS)
def test_a_dit_is_trained_and_sampled_on_another_s_vae(form: str, world: Path, tmp_path: Path) -> None:
    sys.path.insert(0, str(UNIT))
    import published

    published.save(form, tmp_path / "vae")
    words = [*FORMS[form], f"inputs.vae={tmp_path}", f"run={form}", "machine=laptop", "inputs.captions=null"]
    call(world, "stage=dit", "trainer.max_steps=2", *words)  # which makes the latents first
    call(world, "stage=sample", "sampler.steps=2", *words)
    clips = list((world / "outputs" / form / "sample" / "base" / "samples").glob("*.mp4"))
    assert len(clips) == 3
    other = "cogvideox" if form == "wan" else "wan"
    said = call(world, "stage=encode", f"vae={other}", f"inputs.vae={tmp_path}", "run=x", "machine=laptop", code=2)
    assert "inputs.vae=" in said and "say vae" in said
