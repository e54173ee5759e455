"""Runs on the stored features of a frozen text encoder, on latents that stage=encode has made."""

from __future__ import annotations

import csv
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import yaml
from hf_tiny import save
from safetensors.torch import load_file
from test_encode import job, write_shards, write_vae

from soratrain.data.datamodule import LatentData
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.distributed.checkpoint import latest_checkpoint
from soratrain.distributed.fit import fit
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.errors import DataError
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_text import HFText
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.dit import DiTStage

STEPS = 4


@pytest.fixture
def place(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards")
    write_vae(tmp_path / "vae")
    job(tmp_path, text=partial(FrozenText, folder=str(save("t5", tmp_path / "encoder")), dim=16))()
    return tmp_path


def train(place: Path, name: str, *, stop_at: int = 0, features: str = "auto", pooled: bool = True) -> list[float]:
    """Train, and return the loss of each step."""
    L.seed_everything(1, verbose=False)
    stage = DiTStage(
        dit=partial(DiT, channels=4, dim=16, depth=1, num_heads=2, text_dim=16, pooled_text=pooled),
        text=partial(FrozenText, folder=str(place / "encoder"), dim=16, features=features),
        objective=Flow(),
        conditioning=Conditioning(caption_dropout=0.3),
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(warmup_steps=0),
        max_steps=STEPS,
    )
    options = {"ema": 0.9, "checkpoint_every": 2, "log_every": 1, "accumulate": 1}
    trainer = build_trainer(
        out=str(place / name),
        max_steps=stop_at or STEPS,
        strategy=StrategyOptions(name="single"),
        accelerator="cpu",
        devices=1,
        **options,  # type: ignore[arg-type]
    )
    fit(trainer, stage, LatentData(latents=str(place / "out"), seed=0, max_steps=STEPS, batch_size=2, max_batch_size=2))
    with (place / name / "metrics.csv").open() as lines:
        return [float(row["loss"]) for row in csv.DictReader(lines)]


def test_a_stopped_run_goes_on_as_if_it_had_not_been_and_live_features_give_its_losses(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(place, "whole")
    live = train(place, "live", features="live")
    assert whole == pytest.approx(live, rel=5e-3) and whole != live
    monkeypatch.setattr(HFText, "load", None)  # stored features need no net
    train(place, "broken", stop_at=2)
    assert train(place, "broken") == whole
    first, second = (load_file(place / name / "weights" / "text.safetensors") for name in ("whole", "broken"))
    assert set(first) == {"null", "encoder_digest"} and all(bool((first[key] == second[key]).all()) for key in first)
    document = yaml.safe_load((place / "whole" / "weights" / "text.yaml").read_text())
    record = HFText(folder=str(place / "encoder"), dim=16).record()
    assert document["extra"]["encoder"] == record and document["kwargs"]["folder"] == record["folder"]
    saved = latest_checkpoint(place / "whole" / "checkpoints")
    assert saved is not None
    names = [name.split("/text.") for name in load_file(saved / "rank-00000.safetensors") if "/text." in name]
    assert {name for _, name in names} == {"encoder_digest", "null"}


def test_a_run_goes_on_with_the_encoder_that_it_began_with_alone(place: Path) -> None:
    train(place, "out2", stop_at=2, features="live")
    save("t5", place / "encoder", seed=1)
    with pytest.raises(DataError, match="trained with another text encoder"):
        train(place, "out2", features="live")
    with pytest.raises(DataError, match="holds text features of another encoder"):
        train(place, "new")
