"""What a run says of its memory before it starts is what stage=plan says of it."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import published
import pytest
import torch
import vlm_parts_tiny
from data_tiny import write_clips, write_latents
from planned_tiny import planned
from safetensors.torch import load_file, save_file
from tiny_dit import VAE_FACTORY, write_vae

from soratrain.data.buckets import Native
from soratrain.data.datamodule import LatentData, VideoData
from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.flow import Flow
from soratrain.errors import DataError
from soratrain.models.autoencoders import load_vae, outline
from soratrain.models.dit import DiT
from soratrain.models.frozen_text import FrozenText
from soratrain.models.hf_vision import ASIDE
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.beside import TEXT, VAE
from soratrain.stages.captioner import CaptionerStage
from soratrain.stages.dit import DiTStage

SHAPES = [(48, 64, 9)] * 6 + [(64, 48, 1)] * 2
SMALL = {"dim": 32, "depth": 2, "num_heads": 2}
WORDS = ["target=dit", "trainer.precision=32-true", "data.batch_size=2", "dit.mlp_ratio=3.0"]
WORDS += [f"dit.{key}={value}" for key, value in SMALL.items()]


def begun(data: Any, *, channels: int = 4, text: partial | None = None, **options: Any) -> tuple[DiTStage, Any]:
    """Return a stage whose trainer has these data, and that trainer."""
    stage = DiTStage(
        dit=partial(DiT, channels=channels, text_dim=8, mlp_ratio=3.0, **SMALL),
        text=text or partial(ByteTextEncoder, dim=8, depth=1, num_heads=2, table=32, max_tokens=12),
        objective=Flow(),
        optimizer=OptimizerFactory(lr=1e-2),
        schedule=Schedule(),
        max_steps=4,
        **options,
    )
    trainer = SimpleNamespace(datamodule=data, strategy=SimpleNamespace(sequence=1))
    stage._trainer = trainer  # type: ignore[assignment]
    return stage, trainer


def foretold(data: Any, **options: Any) -> tuple[int, dict[str, int], str]:
    """Return the activations that a run says before it starts, what lies beside, and what it does not count."""
    stage, trainer = begun(data, **options)
    with torch.device("meta"):
        nets = {name: factory() for name, factory in stage.factories.items()}
    activations = stage.activations(data.plan(1), nets, False)
    assert activations and trainer
    return activations, *stage.beside(nets)  # type: ignore[return-value]


def seen(file: Path) -> int:
    """Return the numbers in a file, without the half of a CLIP that sees nothing."""
    return sum(tensor.numel() for name, tensor in load_file(file).items() if not name.startswith(ASIDE))


def stored(folder: Path, stride: int, channels: int = 4) -> LatentData:
    latents = write_latents(folder / f"latents{stride}", SHAPES, channels=channels, stride=stride)
    return LatentData(latents=str(latents), seed=0, max_steps=4, batch_size=2)


def clips(folder: Path) -> VideoData:
    return VideoData(shards=str(folder / "shards"), buckets=Native(), seed=0, max_steps=4, batch_size=2)


@pytest.mark.parametrize(("vae", "stride", "channels"), [("tiny", 8, 16), ("hc", 16, 48), ("wan22", 16, 48)])
def test_the_stride_of_stored_latents_is_their_own_and_the_plans(
    tmp_path: Path, vae: str, stride: int, channels: int
) -> None:
    write_clips(tmp_path / "shards", SHAPES)
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    plan = planned(tmp_path, f"vae={vae}", *WORDS)
    said, beside, unknown = foretold(stored(tmp_path, stride, channels), channels=channels)
    assert said == pytest.approx(plan["memory"]["gib"]["activations"] * 2**30, abs=1)
    assert beside == {} and unknown == ""


def test_a_live_vae_counts_with_its_own_stride_ours_or_anothers(tmp_path: Path) -> None:
    write_clips(tmp_path / "shards", SHAPES)
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    published.save("wan22", tmp_path / "wan22")
    write_vae(tmp_path / "ours")
    found = {}
    for name in ("ours", "wan22"):
        place = str(tmp_path / name)
        numbers = sum(parameter.numel() for parameter in load_vae(place).parameters())
        assert outline(place) == (((4, 8, 8) if name == "ours" else (4, 16, 16)), numbers)
        found[name], beside, unknown = foretold(clips(tmp_path), vae=place)
        assert beside == {VAE: 4 * numbers} and unknown == ""
    assert found["ours"] == 4 * found["wan22"]
    words = ["vae=wan22", "latents=live", *WORDS]
    plan = planned(tmp_path, *words, f"inputs.vae={tmp_path / 'wan22'}")["memory"]
    assert plan["gib"]["activations"] * 2**30 == pytest.approx(found["wan22"], abs=1)
    assert plan["gib"][VAE] * 2**30 == pytest.approx(4 * numbers)
    plan = planned(tmp_path, *words, f"inputs.vae={tmp_path / 'none'}", "fresh=true")["memory"]
    assert VAE not in plan["gib"] and f"the VAE runs live, and {tmp_path / 'none'} is not here" in plan["said"]
    with pytest.raises(DataError):
        outline(tmp_path / "none")


def test_a_text_encoder_counts_where_it_reads_at_every_step(tmp_path: Path) -> None:
    (tmp_path / "encoder").mkdir()
    save_file({"a": torch.zeros(1000, 3)}, str(tmp_path / "encoder" / "model.safetensors"))
    text = partial(FrozenText, folder=str(tmp_path / "encoder"), dim=8, dtype="bf16")
    data = stored(tmp_path, 8)
    assert foretold(data, text=text)[1] == {TEXT: 6000}
    held = {"kind": "hf", "folder": str(tmp_path / "encoder"), "digest": "", "max_tokens": 512}
    data.stored_texts = lambda: {"there": held}  # type: ignore[method-assign]
    assert foretold(data, text=text)[1] == {}
    assert foretold(data, text=partial(text, features="live"))[1] == {TEXT: 6000}
    missing = partial(text, folder=str(tmp_path / "gone"), features="live")
    assert f"{tmp_path / 'gone'} is not here to be counted" in foretold(data, text=missing)[2]


def test_an_end_that_is_given_counts_before_the_start_too(tmp_path: Path) -> None:
    data = stored(tmp_path, 8)
    given = Conditioning(mix={"connect": 0.1}, tail_frames=[1])
    assert foretold(data, conditioning=given)[0] == pytest.approx(foretold(data)[0] * 4 / 3, rel=1e-4)
    assert given.twice(3) == 0.1 and given.twice(1) == 0 and VAE_FACTORY.keywords["latent_channels"] == 4


def test_frozen_nets_of_a_captioner_are_rows_of_their_own_whole_on_every_rank(tmp_path: Path, capsys) -> None:
    write_clips(tmp_path / "shards", SHAPES)
    (tmp_path / "shards" / "dataset.json").write_text("{}")
    folders = vlm_parts_tiny.save_encoder(tmp_path / "eye"), vlm_parts_tiny.save_language(tmp_path / "tongue")
    small = {"dim": 16, "depth": 1, "num_heads": 2, "queries": 3, "max_tokens": 24, "instructions": "null"}
    words = ["target=captioner", "captioner=vlm", f"captioner.vision={folders[0]}", f"captioner.language={folders[1]}"]
    words += [f"captioner.{key}={value}" for key, value in small.items()]
    words += ["data.batch_size=2", "optimizer=adamw", "strategy=zero3", "stage.job.ranks=4"]
    memory = planned(tmp_path, *words)["memory"]
    frozen = {name: round(gib * 2**30) for name, gib in memory["gib"].items() if "frozen" in name}
    eye, tongue = "the frozen vision encoder's weights", "the frozen language model's weights"
    assert list(frozen) == [eye, tongue]
    for held, folder in zip(frozen.values(), folders, strict=True):
        read = 4 * seen(folder / "model.safetensors")
        assert read <= held < read + 1024  # and a few numbers that no file holds
    assert sum(memory["gib"].values()) == pytest.approx(memory["total_gib"] + memory["host_gib"])
    assert eye in capsys.readouterr().out

    text = partial(ByteTextEncoder, dim=16, depth=1, num_heads=2, table=32, max_tokens=12)
    for tuning, rows in (("lora", frozen), ("full", {eye: frozen[eye]})):
        net = vlm_parts_tiny.factory(*folders, language_tuning=tuning)
        stage = CaptionerStage(net=net, text=text, optimizer=OptimizerFactory(), schedule=Schedule(), max_steps=4)
        with torch.device("meta"):
            nets = {name: factory() for name, factory in stage.factories.items()}
        assert stage.beside(nets) == (rows, "")
