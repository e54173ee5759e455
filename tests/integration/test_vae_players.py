"""What decoder and discriminator promise as they train against each other."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from safetensors.torch import load_file
from test_resume import identical
from test_strategies import same_training, steps
from torch.optim.optimizer import register_optimizer_step_pre_hook
from vae_c import NET, SAMPLES, begun, clips, train

from soratrain.callbacks.metrics import NOT_REPEATABLE, read_rows
from soratrain.distributed.checkpoint import CheckpointReader, latest_checkpoint, saved_checkpoints
from soratrain.errors import ConfigError, DataError, DivergedError
from soratrain.models import weights
from soratrain.models.discriminator import PatchDiscriminator
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.vae import VAEStage
from soratrain.stages.vae_adversary import Adversary
from soratrain.stages.vae_latents import encoder_hash

COLUMNS = {"d_loss", "g_loss", "logits_real", "logits_fake", "d_weight", "lecam", "d_accuracy", "d_grad_norm"}


def run(out: str, **settings: Any) -> None:
    """Train in a process of its own."""
    train(out, **settings)


def whole(out: Path) -> dict[str, torch.Tensor]:
    return torch.load(out / "whole.pt", weights_only=True)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return the folder that a run began from, and the run's."""
    start, out = begun(tmp_path_factory.mktemp("b")), tmp_path_factory.mktemp("c")
    train(out, begin=start, clip=0.0)
    return start, out


def test_encoder_and_statistics_stay_and_so_do_latents_to_the_last_bit(trained: tuple[Path, Path]) -> None:
    before, after = (weights.load(folder, "vae")[0] for folder in trained)
    assert encoder_hash(before) == encoder_hash(after)  # type: ignore[arg-type]
    video = clips(3, 4).pixels()
    with torch.no_grad():
        latent = before.encode(video)
        assert torch.equal(after.encode(video), latent)
        assert not torch.equal(after.decode(latent), before.decode(latent))


def test_the_average_is_exported_and_the_discriminator_is_not(trained: tuple[Path, Path]) -> None:
    exported = load_file(trained[1] / "weights" / "vae.safetensors")
    kept = load_file(trained[1] / "checkpoints" / "step-00000006" / "rank-00000.safetensors")
    name = "decoder.0.conv.weight"
    assert torch.equal(exported[name].flatten(), kept[f"average/vae.{name}"])
    assert not torch.equal(exported[name].flatten(), kept[f"weight/vae.{name}"])
    assert sorted(path.name for path in (trained[1] / "weights").iterdir()) == ["vae.safetensors", "vae.yaml"]


def test_each_step_counts_once_and_its_row_tells_of_both_players(trained: tuple[Path, Path]) -> None:
    rows = read_rows(trained[1] / "metrics.csv")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    for row in rows:
        playing = int(row["step"]) > 2  # the discriminator rests for a fifth of six steps: 0 and 1
        assert {name for name in COLUMNS if row[name]} == (COLUMNS if playing else set())
    assert [folder.name for folder in saved_checkpoints(trained[1] / "checkpoints")] == [
        "step-00000004",
        "step-00000006",
    ]


def test_the_generator_s_weight_is_what_the_step_before_measured(trained: tuple[Path, Path]) -> None:
    rows = [row for row in steps(trained[1]) if row["step"] > 2]
    assert rows[0]["d_weight"] == 0 and all(row["d_weight"] > 0 for row in rows[1:])


@pytest.mark.parametrize("frozen", [True, False])
def test_accumulated_gradients_of_both_players_are_those_of_one_batch(frozen: bool, tmp_path: Path) -> None:
    settings = {"optimizer": "sgd", "clip": 0.3, "max_steps": 5, "begin": begun(tmp_path) if frozen else None}
    for per_micro in (SAMPLES, SAMPLES // 4):
        train(tmp_path / str(per_micro), per_micro=per_micro, **settings)
    first, second = steps(tmp_path / str(SAMPLES)), steps(tmp_path / str(SAMPLES // 4))
    for name in ("grad_norm", "d_grad_norm", "d_weight"):
        values = [(one[name], other[name]) for one, other in zip(first, second, strict=True) if name in one]
        assert values and all(one == pytest.approx(other, rel=1e-4, abs=1e-9) for one, other in values)
    ours, theirs = whole(tmp_path / str(SAMPLES)), whole(tmp_path / str(SAMPLES // 4))
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=1e-5)
    moved = [name for name, value in ours.items() if name.startswith("disc.") and value.abs().max() > 0]
    assert len(moved) > 4


def test_each_player_s_gradient_is_clipped_apart(tmp_path: Path) -> None:
    train(tmp_path, optimizer="sgd", clip=1e-3, max_steps=6, checkpoint_every=1, begin=begun(tmp_path))
    folders = saved_checkpoints(tmp_path / "checkpoints")
    rate = steps(tmp_path)[-1]["lr"]
    before, after = (CheckpointReader(folder) for folder in folders[-2:])
    for player, factor in (("vae.", 1), ("disc.", 2)):  # the discriminator learns twice as fast
        moved = 0.0
        for key, pieces in after.pieces.items():
            if key.startswith(f"weight/{player}"):
                after.read(key, 0, 1)  # opens the file
                size = after.open[pieces[0][0]].get_slice(key).get_shape()[0]
                moved += float((after.read(key, 0, size) - before.read(key, 0, size)).square().sum())
        assert moved**0.5 == pytest.approx(1e-3 * factor * rate, rel=0.02)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stop_and_resume_equals_the_unbroken_run_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"begin": begun(tmp_path), "optimizer": optimizer, "max_steps": 7, "log_every": 3}
    settings |= {"poison": {3: "rebuilt", 4: "real"}}  # the count in a row is gone on with, too
    train(tmp_path / "whole", **settings)
    train(tmp_path / "broken", stop_at=5, **settings)  # as if killed after step 5: steps 4 to 5 are lost
    assert latest_checkpoint(tmp_path / "broken" / "checkpoints").name == "step-00000004"
    train(tmp_path / "broken", **settings)
    identical(tmp_path / "whole", tmp_path / "broken", net="vae")


def test_two_processes_equal_one(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"begin": str(begun(tmp_path)), "per_micro": 2, "max_steps": 5, "optimizer": "sgd"}
    run_ranks(run, 1, out=str(tmp_path / "one"), **settings)
    run_ranks(run, 2, out=str(tmp_path / "two"), strategy="ddp", ranks=2, **settings)
    same_training(tmp_path / "one", tmp_path / "two")
    for name, value in whole(tmp_path / "one").items():
        torch.testing.assert_close(value, whole(tmp_path / "two")[name], rtol=1e-5, atol=1e-5)


@pytest.mark.full
def test_two_processes_skip_what_one_of_them_finds_bad_and_resume_bit_for_bit(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"strategy": "ddp", "ranks": 2, "max_steps": 6, "poison": {3: "rebuilt", 4: "real"}}
    run_ranks(run, 2, out=str(tmp_path / "whole"), **settings)
    run_ranks(run, 2, out=str(tmp_path / "broken"), stop_at=5, **settings)
    run_ranks(run, 2, out=str(tmp_path / "broken"), **settings)
    assert [row.get("bad_steps") for row in steps_of(tmp_path / "whole")] == ["0", "0", "0", "1", "1", "0"]
    assert steps_of(tmp_path / "whole") == steps_of(tmp_path / "broken")
    ours, theirs = whole(tmp_path / "whole"), whole(tmp_path / "broken")
    assert all(torch.equal(ours[name], theirs[name]) and ours[name].isfinite().all() for name in ours)


def steps_of(out: Path) -> list[dict[str, str]]:
    """Return the rows less what time decides; a skipped step has no figures."""
    return [
        {name: value for name, value in row.items() if name not in NOT_REPEATABLE}
        for row in read_rows(out / "metrics.csv")
    ]


def test_bf16_computes_both_players_near_fp32(tmp_path: Path) -> None:
    begin = begun(tmp_path)
    for precision in ("32-true", "bf16-mixed"):
        train(tmp_path / precision, begin=begin, max_steps=5, precision=precision, optimizer="sgd")
    exact, mixed = steps(tmp_path / "32-true"), steps(tmp_path / "bf16-mixed")
    assert exact != mixed
    for one, other in zip(exact, mixed, strict=True):
        for name in ("loss", "d_loss", "logits_real"):
            assert one.get(name) == pytest.approx(other.get(name), abs=0.02)
    assert all(value.dtype in (torch.float32, torch.int64) for value in whole(tmp_path / "bf16-mixed").values())


def test_optimizers_step_outside_of_autocast(tmp_path: Path) -> None:
    seen: list[bool] = []
    hook = register_optimizer_step_pre_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    try:
        train(tmp_path, begin=begun(tmp_path), max_steps=2, precision="bf16-mixed", optimizer="muon")
    finally:
        hook.remove()
    assert seen and not any(seen)


@pytest.mark.parametrize(("spoilt", "still"), [("rebuilt", ("vae.", "disc.")), ("real", ("disc.",))])
def test_an_update_that_is_no_number_is_skipped_counted_and_said(
    spoilt: str, still: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("WARNING", logger="soratrain"):
        train(tmp_path, max_steps=5, checkpoint_every=1, poison={3: spoilt}, begin=begun(tmp_path))
    assert "step 4: the loss or gradient of" in caplog.text and "(1 in a row, 2 may be)" in caplog.text
    rows = steps_of(tmp_path)
    assert [row["bad_steps"] for row in rows] == ["0", "0", "0", "1", "0"]
    assert rows[3]["loss"] == rows[3]["d_loss"] == "" and rows[4]["loss"] and rows[3]["samples"] == str(SAMPLES)


def test_players_keep_their_weights_in_a_skipped_step(tmp_path: Path) -> None:
    train(tmp_path, max_steps=5, checkpoint_every=1, poison={3: "real"}, begin=begun(tmp_path), stop_at=4)
    before, after = (folder / "rank-00000.safetensors" for folder in folders_of(tmp_path, 3, 4))
    one, other = load_file(before), load_file(after)
    same = {name for name in one if torch.equal(one[name], other[name])}
    assert {name for name in one if name.startswith("weight/disc.")} <= same
    assert {name for name in one if name.startswith("buffer/adversary.")} <= same
    assert not any(name.startswith("weight/vae.decoder.") for name in same)


def folders_of(out: Path, *numbers: int) -> list[Path]:
    return [out / "checkpoints" / f"step-{number:08d}" for number in numbers]


def test_too_many_bad_steps_in_a_row_end_the_run_and_the_last_good_checkpoint_stands(tmp_path: Path) -> None:
    poison = dict.fromkeys((1, 3, 4, 5), "real") | {1: "rebuilt"}
    with pytest.raises(DivergedError, match=r"of the discriminator is no number at step 6, the 3\. step in a row"):
        train(tmp_path, max_steps=9, checkpoint_every=1, poison=poison, begin=begun(tmp_path))
    assert latest_checkpoint(tmp_path / "checkpoints").name == "step-00000005"
    assert all(value.isfinite().all() for value in whole_of(tmp_path).values())


def test_the_count_in_a_row_is_gone_on_with(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"begin": begun(tmp_path), "poison": {3: "real", 4: "real"}, "max_bad_steps": 1}
    train(tmp_path / "out", stop_at=4, **settings)
    with pytest.raises(DivergedError, match=r"at step 5, the 2\. step in a row"):
        train(tmp_path / "out", **settings)


def whole_of(out: Path) -> dict[str, torch.Tensor]:
    newest = latest_checkpoint(out / "checkpoints")
    assert newest is not None
    return load_file(newest / "rank-00000.safetensors")


def test_a_moved_encoder_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nudge(stage: VAEStage, *_: Any) -> None:
        with torch.no_grad():
            next(stage.vae.encoder.parameters()).mul_(1 + 1e-6)

    monkeypatch.setattr(VAEStage, "on_train_batch_end", nudge, raising=False)
    with pytest.raises(DataError, match="the frozen encoder has changed"):
        train(tmp_path, max_steps=2, begin=begun(tmp_path))


def test_freezing_what_was_never_trained_and_zero_with_two_optimizers_are_refused(tmp_path: Path) -> None:
    common: dict[str, Any] = {"net": NET, "optimizer": OptimizerFactory(), "schedule": Schedule(), "max_steps": 1}
    stage = VAEStage(**common, freeze_encoder=True)
    with pytest.raises(ConfigError, match="say with init=FOLDER which"):
        stage.configure_model()
    with pytest.raises(ConfigError, match="a discriminator needs its own"):
        VAEStage(**common, adversary=Adversary(net=partial(PatchDiscriminator)))
    with pytest.raises(RuntimeError, match="DeepSpeed takes one optimizer"):
        run_ranks(run, 2, out=str(tmp_path), strategy="zero2", ranks=2, begin=str(begun(tmp_path)))


def test_the_rate_of_both_optimizers_follows_the_schedule(trained: tuple[Path, Path]) -> None:
    rates = [row["lr"] for row in steps(trained[1])]
    assert rates[0] == pytest.approx(0.005) and rates[1] == pytest.approx(0.01)
    assert all(after < before for before, after in pairwise(rates[2:]))
