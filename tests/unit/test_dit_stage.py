"""Promises of training the DiT and of drawing with it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from dit_stage_tiny import (
    DDPMS,
    FLOW,
    TEXT_FACTORY,
    batch,
    gradients,
    stage,
    write_chain,
)

from soratrain.diffusion.conditioning import Conditioning
from soratrain.diffusion.ddpm import DDPM
from soratrain.diffusion.flow import Flow
from soratrain.diffusion.objective import Objective
from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.optim import OptimizerFactory


def test_a_steps_gradient_does_not_depend_on_how_its_samples_fall_into_packs() -> None:
    module = stage()
    whole = gradients(module, [[0, 1, 2, 3]])
    for parts in ([[0], [1], [2], [3]], [[3, 1], [2, 0]]):
        for name, gradient in gradients(module, parts).items():
            torch.testing.assert_close(gradient, whole[name], atol=1e-5, rtol=1e-3, msg=name)


def test_the_same_batch_gives_the_same_loss_whatever_the_global_random_state() -> None:
    module = stage()
    first = module.training_step(batch([0, 1]), 0)
    torch.manual_seed(123)
    assert torch.equal(module.training_step(batch([0, 1]), 0), first)


def test_every_parameter_of_both_nets_is_in_the_graph_even_when_all_captions_are_dropped() -> None:
    for dropout in (0.0, 1.0):
        for name, gradient in gradients(
            stage(conditioning=Conditioning(caption_dropout=dropout)), [[0, 1, 2, 3]]
        ).items():
            assert gradient.isfinite().all(), name


def test_dropped_captions_do_not_reach_the_net() -> None:
    module = stage(conditioning=Conditioning(caption_dropout=1.0))
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    one, other = batch([0, 1]), batch([0, 1])
    object.__setattr__(other, "captions", ("something else", "entirely"))
    assert torch.equal(module.training_step(one, 0), module.training_step(other, 0))
    module.conditioning = Conditioning(caption_dropout=0.0)
    assert not torch.equal(module.training_step(one, 0), module.training_step(other, 0))


@pytest.mark.parametrize("objective", [FLOW, *DDPMS])
def test_training_lowers_the_loss(objective: Objective) -> None:
    module = stage(objective, conditioning=Conditioning(caption_dropout=0.0))
    optimizer = OptimizerFactory(name="muon", lr=1e-2)(module.named_parameters())
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = module.training_step(batch([0, 1, 2, 3]), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("objective", [DDPM(), Flow(prediction="balanced"), DDPM(prediction="x0")])
def test_weights_of_another_objective_are_refused(tmp_path: Path, objective: Objective) -> None:
    write_chain(tmp_path)
    said = f"trained with objective=flow and .*=velocity, .*={objective.name} and .*={objective.prediction}; use those"
    with pytest.raises(ConfigError, match=said):
        stage(objective).start_from("dit", tmp_path)
    module = stage(Flow(shift=7.0))
    module.start_from("dit", tmp_path)
    assert module.origins["dit"][0] == tmp_path


def test_weights_can_be_read_by_whom_other_files_can(tmp_path: Path) -> None:
    write_chain(tmp_path)
    files = sorted((tmp_path / "weights").iterdir())
    assert len({file.stat().st_mode for file in files}) == 1 and len(files) == 6


def test_text_can_start_from_another_stages_encoder(tmp_path: Path) -> None:
    torch.manual_seed(5)
    tower = TEXT_FACTORY()
    weights.save(tmp_path, "text", tower, TEXT_FACTORY, {})
    module = stage(text_init=str(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(tower.parameters(), module.text.parameters(), strict=True))
    with pytest.raises(DataError, match="text"):
        stage(text_init=str(tmp_path / "nowhere"))
