"""Promises of what makes the DiT faster or smaller: it computes the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_dit import EQUAL, SHAPES, build, clips, texts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soratrain.callbacks.compiled import compile_blocks
from soratrain.diffusion.segments import flatten
from soratrain.distributed.memory import measured_activations
from soratrain.errors import ConfigError
from soratrain.models.dit import DiT, Tokens


def pack(kind: str) -> Tokens:
    """Return equal clips, unequal ones, or ones with rows of their own for every other token."""
    tokens = flatten([[segment] for segment in clips(EQUAL if kind == "equal" else SHAPES)], (1, 2, 2)).tokens
    if kind != "rows":
        return tokens
    owner = tokens.packing.owner()
    return replace(
        tokens,
        sigma=torch.cat((tokens.sigma, tokens.sigma / 2)),
        row_clips=tokens.row_clips.repeat(2),
        rows=owner + 3 * (torch.arange(len(owner)) % 2),
    )


def step(net: DiT, tokens: Tokens) -> dict[str, Tensor]:
    """Return the output and the gradients of parameters, patches and text."""
    text, packing = texts(3)
    text, values = text.requires_grad_(), tokens.values.clone().requires_grad_()
    net.zero_grad()
    out = net(replace(tokens, values=values), text, packing)
    out.float().square().sum().backward()
    found = {name: parameter.grad.clone() for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert text.grad is not None and values.grad is not None and len(found) == len(list(net.parameters()))
    return {"out": out.detach(), "text": text.grad, "values": values.grad, **found}


@pytest.mark.parametrize("kind", ["equal", "unequal", "rows"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_what_is_computed_again_gives_the_same_output_and_gradients_bit_for_bit(recompute: str, kind: str) -> None:
    plain, again = (build(pooled_text=True, recompute=mode) for mode in ("none", recompute))
    assert list(plain.state_dict()) == list(again.state_dict())
    expected, found = step(plain, pack(kind)), step(again, pack(kind))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("kind", ["equal", "unequal"])
def test_each_way_to_recompute_keeps_less_than_the_one_before(kind: str) -> None:
    tokens, kept = pack(kind), []
    for recompute in ("none", "selective", "full"):
        net = build(dim=48, depth=4, mlp_ratio=4.0, recompute=recompute)
        call = net.forward
        net.forward = lambda _, call=call: call(tokens, *texts(3))  # type: ignore[method-assign, misc, assignment]
        kept.append(measured_activations(net, torch.zeros(1)))
    assert kept[1] < 0.6 * kept[0] and kept[2] < 0.4 * kept[1]


class Counted(TorchDispatchMode):
    """Counts the operations that are run, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def test_selective_computes_neither_attention_nor_its_products_again() -> None:
    counted = {}
    for recompute in ("none", "selective", "full"):
        net, mode = build(recompute=recompute), Counted()
        with mode:
            step(net, pack("equal"))
        attention = sum(count for name, count in mode.counts.items() if name.startswith("_scaled_dot_product"))
        counted[recompute] = attention, mode.counts["addmm"]
    depth, per_block = 2, 7  # products of a block: qkv, out, q, kv, out, up, down
    none = counted["none"]
    assert counted["selective"] == (none[0], none[1] + depth)  # `up`; what `down` gave is kept by the gate
    assert counted["full"] == (none[0] + 2 * depth, none[1] + depth * per_block)


def test_unknown_ways_to_recompute_are_refused() -> None:
    with pytest.raises(ConfigError, match="dit.recompute='some' is unknown; use one of none, selective, full"):
        build(recompute="some")


@pytest.mark.full
def test_compiled_blocks_compute_the_same_keep_their_names_and_serve_every_pack() -> None:
    torch._dynamo.reset()
    plain, compiled = build(), build()
    assert compile_blocks(compiled) == 2 and list(compiled.state_dict()) == list(plain.state_dict())
    kinds = ("unequal", "equal", "rows")
    for kind in kinds:
        expected, found = step(plain, pack(kind)), step(compiled, pack(kind))
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)
    torch._dynamo.config.error_on_recompile = True
    try:
        tokens = flatten([[segment] for segment in clips([(4, 2, 6, 4), (4, 3, 4, 6), (4, 1, 4, 4)])], (1, 2, 2)).tokens
        step(compiled, tokens)
    finally:
        torch._dynamo.config.error_on_recompile = False
