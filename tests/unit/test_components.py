"""What a rank holds, by component, is what arithmetic says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from soratrain.distributed.components import Memory, components
from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError

NUMBERS = 1000  # 25 x 40, no bias


def of(name: str, *, ranks: int = 4, optimizer: str = "adamw", **settings: Any) -> Memory:
    with torch.device("meta"):
        net = nn.Linear(40, 25, bias=False)
    options = {key: settings.pop(key) for key in ("weights", "reduce", "bucket", "live") if key in settings}
    known = {"average": True, "half": False, "cuda": True, **settings}
    return components([net], StrategyOptions(name=name, **options), ranks=ranks, optimizer=optimizer, **known)


@pytest.mark.parametrize(("name", "zero"), [("ddp", 0), ("zero1", 1), ("zero2", 2), ("zero3", 3)])
def test_zero_divides_what_its_stage_shards(name: str, zero: int) -> None:
    held = of(name)
    assert held.of("weights") == (1000 if zero == 3 else 4000)
    assert held.of("gradients") == (1000 if zero >= 2 else 4000)
    assert (held.of("optimizer"), held.of("average")) == ((2000, 1000) if zero else (8000, 4000))
    assert held.of("master") == (1000 if zero else 0)
    assert held.total(host=True) == 0 and held.total(host=False) == sum(part.bytes for part in held.components)


def test_weights_in_bf16_are_half_and_all_else_stays_fp32() -> None:
    for name, share in (("zero2", 1), ("zero3", 4)):
        wide, narrow = of(name), of(name, weights="bf16", half=True)
        assert narrow.of("weights") == wide.of("weights") // 2 == 2000 // share
        for kept in ("gradients", "optimizer", "average", "master"):
            assert wide.of(kept) == narrow.of(kept)
    assert of("zero2", half=True).of("bf16 copies") == 2000
    assert of("zero2", half=True, weights="bf16").of("bf16 copies") == of("zero3", half=True).of("bf16 copies") == 0


def test_offload_moves_to_the_host_what_only_the_update_needs() -> None:
    for name, away in (("zero2_offload", set()), ("zero3_offload", {"weights"})):
        held = of(name)
        on_host = {part.name for part in held.components if part.host}
        assert on_host == {"gradients", "optimizer", "average", "master", "staging"} | away
        plain = of(name.removesuffix("_offload"))
        assert held.total(host=False) < plain.total(host=False)
        assert not any(part.host for part in of(name, cuda=False).components), "a CPU has but one memory"


def test_buffers_for_messages_and_what_stays_gathered_are_bounded_by_their_options() -> None:
    assert of("zero2", bucket=100).of("messages") == 2 * 400
    assert of("zero3", bucket=100, reduce="bf16").of("messages") == 200
    assert of("zero3", bucket=100, live=50).of("gathered") == 600 and of("zero3").of("gathered") == 4000


def test_muon_keeps_one_number_for_each_of_a_matrix_and_adamw_two() -> None:
    assert of("ddp", optimizer="muon").of("optimizer") == 4000 and of("ddp").of("optimizer") == 8000


def test_it_is_told_in_one_line_and_what_is_not_known_is_said() -> None:
    said = of("zero2_offload").line("zero2_offload", "cuda")
    assert "\n" not in said and "the GPU" in said and "the host" in said and "activations not counted" in said
    assert "activations 1.95 KiB" in of("ddp", activations=2000, cuda=False).line("ddp", "cpu")
    with pytest.raises(ConfigError, match="4 ranks with strategy=single"):
        of("single")
