"""A net that is cut up as it is built is the same net, and no rank ever holds it whole."""

from __future__ import annotations

import ctypes
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from ranks import run_ranks

from soratrain.callbacks.watch import Watch
from soratrain.distributed.fragments import assemble
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.trainer import build_trainer
from soratrain.models import weights
from soratrain.models.dit import DiT
from soratrain.models.text import ByteTextEncoder
from soratrain.optim import OptimizerFactory, Schedule
from soratrain.stages.base import TrainStage

DEPTH = 12
WIDE: dict[str, Any] = {"channels": 4, "dim": 512, "depth": DEPTH, "num_heads": 4, "text_dim": 64}
TINY: dict[str, Any] = {"channels": 4, "dim": 32, "depth": 2, "num_heads": 2, "text_dim": 16}


class Loaded(Exception):
    """Ends a run once its nets are built."""


class Stage(TrainStage):
    """A stage of which nothing but its nets is wanted."""

    def training_step(self, batch: object, batch_idx: int) -> None:
        raise NotImplementedError


class Look(L.Callback):
    """Looks at the weights as training would begin, and ends it there."""

    def __init__(self) -> None:
        self.state: dict[str, torch.Tensor] = {}

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        fragments = trainer.strategy.fragments()  # type: ignore[attr-defined]
        self.state = dict(assemble(fragments, [fragment.read() for fragment in fragments], torch.device("cpu")))
        raise Loaded


def high_water() -> int:
    """Return the most bytes that this process has held since the kernel was told to forget."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024


def built(folder: str, strategy: str, ranks: int, begin: str = "", weigh: bool = False) -> dict[str, Any]:
    """Return the weights with which training would begin, and the bytes that building the net has added at the most."""
    L.seed_everything(1, verbose=False)
    found: dict[str, Any] = {}

    def wide() -> DiT:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        found["before"] = high_water()
        return DiT(**WIDE)

    nets = {"dit": partial(DiT, **TINY), "text": partial(ByteTextEncoder, dim=16, depth=2, num_heads=2, table=64)}
    if weigh:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 18)  # M_MMAP_THRESHOLD: what is freed is gone, and not kept in the heap's holes
        nets["wide"] = partial(wide)  # after the others, with which all that cutting up needs is loaded
    stage = Stage(nets=nets, optimizer=OptimizerFactory(), schedule=Schedule(), max_steps=1)
    if begin:
        stage.start_from("dit", begin)
    look = Look()
    trainer = build_trainer(
        out=folder,
        max_steps=1,
        strategy=StrategyOptions(name=strategy, bucket=1000),
        accelerator="cpu",
        devices=ranks,
        callbacks=[look],
    )
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    callbacks[:] = [one for one in callbacks if not isinstance(one, Watch)]  # what is raised here ends no other rank
    if weigh:
        configure = stage.configure_model

        def weighed() -> None:
            configure()
            found["bytes"] = high_water() - found["before"]

        stage.configure_model = weighed  # type: ignore[method-assign]
    with pytest.raises(Loaded):
        trainer.fit(stage, torch.utils.data.DataLoader([0]))
    return found if weigh else {name: value.numpy() for name, value in look.state.items()}


@pytest.mark.parametrize("strategy", ["zero3", pytest.param("zero3_offload", marks=pytest.mark.full)])
def test_a_net_cut_up_as_it_is_built_has_the_weights_of_a_whole_one_bit_for_bit(strategy: str, tmp_path: Path) -> None:
    (whole,) = run_ranks(built, 1, folder=str(tmp_path), strategy="single", ranks=1)
    for cut in run_ranks(built, 2, folder=str(tmp_path), strategy=strategy, ranks=2):
        assert cut.keys() == whole.keys()
        for name, value in whole.items():
            assert (value == cut[name]).all(), name


@pytest.mark.full
def test_weights_to_begin_with_are_read_slice_by_slice(tmp_path: Path) -> None:
    torch.manual_seed(7)
    net = DiT(**TINY)
    weights.save(tmp_path / "weights", "dit", net, partial(DiT, **TINY), {})
    for found in run_ranks(built, 2, folder=str(tmp_path), strategy="zero3", ranks=2, begin=str(tmp_path)):
        for name, value in net.state_dict().items():
            assert (value.numpy() == found[f"dit.{name}"]).all(), name


@pytest.mark.full
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux tells a process's peak")
def test_no_rank_holds_more_of_a_net_than_its_slices_and_a_block(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = DiT(**WIDE)
    size = {name: 4 * sum(param.numel() for param in part.parameters()) for name, part in net.named_children()}
    whole, block = sum(size.values()), size["blocks"] // DEPTH
    (plain,) = run_ranks(built, 1, folder=str(tmp_path), strategy="single", ranks=1, weigh=True)
    assert plain["bytes"] > 0.95 * whole
    for found in run_ranks(built, 2, folder=str(tmp_path), strategy="zero3", ranks=2, weigh=True):
        assert found["bytes"] < whole / 2 + (whole - size["blocks"]) + 2 * block
        assert found["bytes"] < 0.85 * whole
