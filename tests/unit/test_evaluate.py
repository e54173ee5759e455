"""Promises of stage=evaluate's chain: every figure is there, and the nets run in the precision asked for."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from dit_stage_tiny import write_chain

from data_prep.world import World, render
from soratrain.diffusion.sampler import Sampler
from soratrain.models import weights
from soratrain.models.captioner import Captioner
from soratrain.stages.evaluate import SPLITS, Evaluate


def test_the_captioner_hears_each_scenes_own_frame_rate() -> None:
    scenes = [World("full").scene(index) for index in range(12)]
    frames = [render(scene) for scene in scenes]
    heard: list[float] = []

    def generate(pixels: torch.Tensor, fps: torch.Tensor, style: str) -> list[str]:
        heard.extend(fps.tolist())
        return [""] * len(pixels)

    job = SimpleNamespace(device="cpu")
    Evaluate.caption(job, SimpleNamespace(generate=generate), frames, scenes)  # type: ignore[arg-type]
    own = [scene.fps for scene in scenes]
    assert sorted(heard) == pytest.approx(sorted(own)) and len(set(own)) > 1


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_the_chain_is_measured_in_the_precision_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    write_chain(tmp_path)
    sizes = {"dim": 16, "depth": 1, "num_heads": 2, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    factory = partial(Captioner, **sizes, table=32, max_bytes=8, vector_dim=8)
    captioner, held = factory(), set[torch.dtype]()
    captioner.teach(["a disc"], ["short"])
    weights.save(tmp_path / "weights", "captioner", captioner, factory, {})
    conv3d, generate = torch.nn.Conv3d.forward, Captioner.generate

    def conv(self: torch.nn.Conv3d, x: torch.Tensor) -> torch.Tensor:
        held.add((out := conv3d(self, x)).dtype)
        return out

    def caption(self: Captioner, *args: object) -> list[str]:
        held.add(torch.bfloat16 if torch.is_autocast_enabled("cpu") else torch.float32)
        return generate(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(torch.nn.Conv3d, "forward", conv)
    monkeypatch.setattr(Captioner, "generate", caption)
    folders = {name: str(tmp_path) for name in ("vae", "captioner", "dit")}
    settings = {"preset": "demo", "world_seed": 0, "prompts": 1, "clips": 1, "seed": 0, "sampler": Sampler(steps=1)}
    found = Evaluate(out=str(tmp_path / "out"), **folders, **settings, precision=precision, device="cpu")()  # type: ignore[arg-type]
    assert held == {torch.bfloat16 if precision == "bf16-mixed" else torch.float32}
    assert all(found["report"][part].keys() == set(SPLITS) for part in ("ceiling", "reconstruction", "samples"))
