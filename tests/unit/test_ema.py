"""What the weight average promises."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from soratrain.callbacks.ema import EMA
from soratrain.distributed.strategy import Single
from soratrain.errors import ConfigError


def averaging(decay: float) -> tuple[EMA, nn.Module, SimpleNamespace]:
    """Return an average of a small module, set up as a trainer would."""
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    module[1].requires_grad_(False)
    strategy = Single(device=torch.device("cpu"))
    strategy._lightning_module = module  # type: ignore[assignment]
    trainer = SimpleNamespace(strategy=strategy)
    ema = EMA(decay)
    ema.on_fit_start(trainer, module)  # type: ignore[arg-type]
    return ema, module, trainer


def test_the_average_follows_the_closed_form_with_warm_up() -> None:
    ema, module, trainer = averaging(0.5)
    weight = module[0].weight
    expected = weight.detach().clone().double()
    for step in range(1, 21):
        with torch.no_grad():
            weight.add_(step)
        ema.step = step
        ema.on_step(trainer, module)  # type: ignore[arg-type]
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
        torch.testing.assert_close(ema.averages[0].view(2, 3).double(), expected, rtol=1e-5, atol=1e-5)


def test_only_trained_weights_are_averaged_and_in_fp32() -> None:
    ema, module, _ = averaging(0.9)
    assert [fragment.name for fragment in ema.fragments] == ["0.weight", "0.bias"]
    assert all(average.dtype == torch.float32 for average in ema.averages)
    assert ema.averages[0].data_ptr() != module[0].weight.data_ptr()


def test_the_average_is_in_place_inside_the_block_and_the_trained_weights_after_it() -> None:
    ema, module, trainer = averaging(0.9)
    trained = module[0].weight.detach().clone()
    for average in ema.averages:
        average.fill_(7.0)
    with pytest.raises(RuntimeError, match="stop"), ema.in_place(trainer):  # type: ignore[arg-type]
        assert (module[0].weight == 7.0).all()
        raise RuntimeError("stop")
    assert torch.equal(module[0].weight, trained)


def test_a_decay_outside_its_range_is_refused() -> None:
    for decay in (1.0, -0.1):
        with pytest.raises(ConfigError, match=f"trainer.ema={decay}"):
            EMA(decay)
