"""The autoencoder's three stages, by the commands that people type, small and short."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml
from test_chain import call

from soratrain.callbacks.metrics import read_rows
from soratrain.models import weights
from soratrain.stages.vae_latents import encoder_hash

STEPS = {"vae_a": 8, "vae_b": 6, "vae_c": 20}
WORDS = [
    "stage=vae",
    "machine=laptop",
    "machine.world.clips=240",
    *(f"machine.steps.{k}={n}" for k, n in STEPS.items()),
]


@pytest.mark.full
def test_c_makes_a_and_b_and_keeps_b_s_latents(tmp_path: Path) -> None:
    refused = call(tmp_path, *WORDS, "+experiment=vae_b", "upstream=fail", "inputs.shards=data/mine", code=2)
    assert "data_prep" in refused.stderr
    made = call(tmp_path, *WORDS, "+experiment=vae_c", "trainer.log_every=1")
    assert "LPIPS is off" in made.stderr
    folders = {name: tmp_path / "outputs/default/vae" / name for name in STEPS}
    for name, folder in folders.items():
        assert (folder / "result.json").is_file(), made.stderr[-2000:]
        assert read_rows(folder / "metrics.csv")[-1]["step"] == str(STEPS[name])
    nets = {name: weights.load(folder, "vae")[0] for name, folder in folders.items()}
    assert encoder_hash(nets["vae_c"]) == encoder_hash(nets["vae_b"]) != encoder_hash(nets["vae_a"])  # type: ignore[arg-type]
    video = torch.rand(1, 3, 5, 48, 48) * 2 - 1
    with torch.no_grad():
        latents = [nets[name].encode(video) for name in ("vae_b", "vae_c")]
        assert torch.equal(*latents)
        assert not torch.equal(*(nets[name].decode(latents[0]) for name in ("vae_b", "vae_c")))
    assert yaml.safe_load((folders["vae_c"] / "upstream.yaml").read_text()).keys() == {"shards", "init"}
    told = [row for row in read_rows(folders["vae_c"] / "metrics.csv") if row["d_loss"]]
    assert len(told) == STEPS["vae_c"] - 1 and all(row["g_loss"] and row["d_weight"] for row in told)

    again = call(tmp_path, *WORDS, "+experiment=vae_a", "fresh=true", "optimizer.lr=1e-3")
    assert again.returncode == 0
    stale = call(tmp_path, *WORDS, "+experiment=vae_c", "run=default", "fresh=true", code=2)
    assert "made from init=outputs/default/vae/vae_a, which has been made anew" in stale.stderr


@pytest.mark.full
def test_what_is_missing_may_be_named_instead_of_made(tmp_path: Path) -> None:
    call(tmp_path, "input=world", "output=data/world", "world.clips=24", module="data_prep")
    refused = call(tmp_path, *WORDS, "+experiment=vae_c", "upstream=fail", code=2)
    assert "init=outputs/default/vae/vae_b: missing or unfinished; make it first: python -m soratrain" in refused.stderr
    assert refused.stderr.strip().endswith("+experiment=vae_b")
