"""Promises of the loss on held-out clips: what is measured, and that training does not notice."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tiny import write_latents
from loading import damage
from PIL import Image
from safetensors.torch import load_file
from tiny_dit import FLOW, SHAPES, train

from soratrain.batch import draw_of, keyed_normal
from soratrain.callbacks.metrics import NOT_REPEATABLE, read_rows
from soratrain.callbacks.validation import Validation
from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.objective import Objective
from soratrain.diffusion.segments import Segment, flatten
from soratrain.distributed.turns import deal
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.patchify import patchify_target

DDPM_V = DDPM(shift=2.0)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_latents(tmp_path_factory.mktemp("validation") / "latents", SHAPES)


def by_hand(out: Path, data: Any, number: int, level: float, objective: Objective, dit: Any, text: Any) -> float:
    """Return a held-out clip's loss at a level from nothing but its key, its latent and the nets."""
    batch = data.held().read(number)
    clean = batch.latents[0].float()
    noise = keyed_normal(draw_of("held out", batch.keys[0]), "noise", clean.shape)
    sigma = torch.tensor(level)
    noised = objective.noised(clean, noise, sigma)
    flat = flatten([[Segment(noised, sigma, float(batch.fps))]], dit.patch, dit.rope_time)
    with torch.no_grad():
        answer = dit(flat.tokens, *text(text.tokenize(batch.captions)))
    error = (answer - patchify_target(objective.target(clean, noise, sigma), dit.patch)).square().mean()
    return float(error * objective.weight(sigma))


@pytest.mark.parametrize("objective", [FLOW, DDPM_V], ids=["flow", "ddpm"])
def test_every_figure_is_the_one_worked_out_by_hand(latents: Path, tmp_path: Path, objective: Objective) -> None:
    trainer, stage, last = train(tmp_path, latents, objective=objective)
    data = trainer.datamodule  # type: ignore[attr-defined]
    rows = [row for row in read_rows(tmp_path / "validation.csv") if row["step"] == "4"]
    assert len(rows) == 2 * 10 * len(set(data.held().buckets))
    averaged = [weights.load(tmp_path, name, "cpu")[0] for name in ("dit", "text")]
    for name, nets in (("raw", (stage.dit, stage.text)), ("ema", averaged)):
        found = []
        for row in rows:
            if row["weights"] != name:
                continue
            buckets = enumerate(data.held().buckets)
            size = (row["size"], row["frames"])
            members = [i for i, b in buckets if (f"{b.width}x{b.height}", str(b.frames)) == size]
            assert len(members) == int(row["clips"]) > 0
            quantile = objective.levels(
                (torch.arange(10) + 0.5) / 10, torch.full((10,), 4)
            )  # shift_tokens is 0: alike for all
            level = float(quantile[(quantile - float(row["level"])).abs().argmin()])
            true = sum(by_hand(tmp_path, data, i, level, objective, *nets) for i in members) / len(members)
            assert float(row["loss"]) == pytest.approx(true, rel=2e-4)
            found += [float(row["loss"])] * len(members)
        mean = sum(found) / len(found)
        assert (last["val_loss"] == pytest.approx(mean)) is (name == "ema")


def test_each_measurement_adds_its_rows_and_a_picture_and_the_last_step_has_one(latents: Path, tmp_path: Path) -> None:
    train(tmp_path, latents, every=2, max_steps=5)
    steps = sorted({int(row["step"]) for row in read_rows(tmp_path / "validation.csv")})
    assert steps == [2, 4, 5]
    pictures = sorted(path.name for path in (tmp_path / "validation").iterdir())
    assert pictures == ["00000002.png", "00000004.png", "00000005.png"]
    metrics = read_rows(tmp_path / "metrics.csv")
    assert [int(row["step"]) for row in metrics if row["val_loss"]] == [2, 4, 5]
    with Image.open(tmp_path / "validation" / "00000005.png") as image:
        width = image.width
    train(tmp_path / "raw", latents, every=9, max_steps=2, ema=0.0)
    assert {row["weights"] for row in read_rows(tmp_path / "raw" / "validation.csv")} == {"raw"}
    with Image.open(tmp_path / "raw" / "validation" / "00000002.png") as image:
        assert image.width < width  # one block instead of two


def outcome(out: Path) -> tuple[list[dict[str, str]], dict[str, torch.Tensor]]:
    """Return what training has made of a run: its metrics, and all that the last checkpoint holds."""
    skipped = (*NOT_REPEATABLE, "val_loss")
    rows = [{key: value for key, value in row.items() if key not in skipped} for row in read_rows(out / "metrics.csv")]
    return rows, load_file(sorted((out / "checkpoints").iterdir())[-1] / "rank-00000.safetensors")


def same(one: Path, other: Path) -> None:
    (rows, state), (others, their) = outcome(one), outcome(other)
    assert rows == others and state.keys() == their.keys()
    assert all(torch.equal(state[name], their[name]) for name in state)


def test_training_is_the_same_bit_for_bit_with_and_without_it(latents: Path, tmp_path: Path) -> None:
    train(tmp_path / "with", latents, every=1, max_steps=5)
    train(tmp_path / "without", latents, every=0, max_steps=5)
    same(tmp_path / "with", tmp_path / "without")
    assert not (tmp_path / "without" / "validation.csv").exists()


def test_a_run_that_goes_on_ends_with_the_files_of_an_unbroken_one(latents: Path, tmp_path: Path) -> None:
    train(tmp_path / "whole", latents, max_steps=5)
    train(tmp_path / "parts", latents, max_steps=5, stop_at=3)
    train(tmp_path / "parts", latents, max_steps=5)
    same(tmp_path / "whole", tmp_path / "parts")
    for name in ("validation.csv", "validation/00000004.png"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "parts" / name).read_bytes()


@pytest.mark.parametrize("call", [2, 3, 4])  # raw and averaged weights of step 4; step 5, when 4 has no checkpoint
def test_a_kill_amid_a_measurement_costs_nothing(latents: Path, tmp_path: Path, monkeypatch: Any, call: int) -> None:
    train(tmp_path / "whole", latents, max_steps=5)
    done, measured = [], Validation.losses

    def killed(self: Validation, *args: Any) -> Any:
        done.append(self.step)
        if len(done) == call + 1:
            raise KeyboardInterrupt
        return measured(self, *args)

    monkeypatch.setattr(Validation, "losses", killed)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "parts", latents, max_steps=5, checkpoint_every=3)
    monkeypatch.undo()
    train(tmp_path / "parts", latents, max_steps=5)
    same(tmp_path / "whole", tmp_path / "parts")
    assert (tmp_path / "whole/validation.csv").read_bytes() == (tmp_path / "parts/validation.csv").read_bytes()


def test_nets_and_random_numbers_are_left_as_they_were(latents: Path, tmp_path: Path, monkeypatch: Any) -> None:
    seen = []
    measure = Validation.measure

    def watched(self: Validation, trainer: Any, stage: Any, held: Any) -> None:
        stage.text.eval()  # a mode that training itself has chosen stays
        before = torch.get_rng_state(), [module.training for module in stage.modules()]
        kept = [parameter.detach().clone() for parameter in stage.parameters()]
        measure(self, trainer, stage, held)
        after = torch.get_rng_state(), [module.training for module in stage.modules()]
        assert torch.equal(before[0], after[0]) and before[1] == after[1]
        assert all(torch.equal(old, new) for old, new in zip(kept, stage.parameters(), strict=True))
        seen.append(self.step)

    monkeypatch.setattr(Validation, "measure", watched)
    train(tmp_path, latents)
    assert seen == [2, 4]


def test_a_damaged_clip_is_left_out_and_only_none_at_all_ends_the_run(tmp_path: Path, caplog: Any) -> None:
    latents = write_latents(tmp_path / "latents", SHAPES)
    trainer, _, _ = train(tmp_path / "whole", latents, max_steps=2)
    held = trainer.datamodule.held()  # type: ignore[attr-defined]
    numbers = [int(held.key(number), 16) for number in range(len(held))]
    damage(latents, numbers[:1])
    with caplog.at_level(logging.WARNING, logger="soratrain"):
        train(tmp_path / "damaged", latents, max_steps=2)
    assert held.key(0) in caplog.text
    counts = [sum(int(r["clips"]) for r in read_rows(tmp_path / n / "validation.csv")) for n in ("whole", "damaged")]
    assert counts == [2 * 10 * 4, 2 * 10 * 3]
    damage(latents, numbers)
    with pytest.raises(DataError, match="none of the held-out clips can be read"):
        train(tmp_path / "none", latents, max_steps=2)


def test_ranks_make_equally_many_calls_and_cut_each_clip_up_alike() -> None:
    tokens = {0: 4, 1: 18, 2: 12, 3: 4, 5: 60}
    alone = {turn.clip: turn.parts for turn in deal(tokens, 1, 10, 40)[0]}
    assert alone == {0: 1, 1: 5, 2: 4, 3: 1, 5: 10}
    for ranks in (2, 3, 8):
        dealt = deal(tokens, ranks, 10, 40)
        assert len({tuple(turn.calls for turn in turns) for turns in dealt}) == 1
        counted = [turn for turns in dealt for turn in turns if turn.counts]
        assert sorted(turn.clip for turn in counted) == sorted(tokens)
        assert all(turn.parts == alone[turn.clip] <= turn.calls for turns in dealt for turn in turns)


def test_too_few_samples_are_all_trained_on_and_said_to_be(tmp_path: Path, caplog: Any) -> None:
    latents = write_latents(tmp_path / "latents", SHAPES[:9])
    with caplog.at_level(logging.INFO, logger="soratrain"):
        _, _, last = train(tmp_path / "run", latents, max_steps=2)
    assert "none is held out" in caplog.text and "val_loss" not in last


def test_bad_values_are_refused(latents: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="validation.every=-1"):
        train(tmp_path, latents, every=-1)
    with pytest.raises(ConfigError, match="validation.levels=0"):
        train(tmp_path, latents, levels=0)


def test_the_time_it_takes_is_not_counted_in_the_speed(latents: Path, tmp_path: Path, monkeypatch: Any) -> None:
    measure = Validation.measure

    def slow(*args: Any) -> None:
        time.sleep(2.0)
        measure(*args)

    monkeypatch.setattr(Validation, "measure", slow)
    train(tmp_path, latents, max_steps=2)
    assert max(float(row["seconds"]) for row in read_rows(tmp_path / "metrics.csv")) < 2.0
