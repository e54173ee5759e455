"""Promises of what makes the DiT faster or smaller: it computes the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_dit import EQUAL, SHAPES, build, clips, texts
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from soratrain.callbacks.compiled import compile_blocks
from soratrain.diffusion.segments import flatten
from soratrain.distributed.memory import measured_activations
from soratrain.errors import ConfigError
from soratrain.models import tokens as tokens_of
from soratrain.models.dit import DiT
from soratrain.models.qk import EPS, prepared
from soratrain.models.rope import rotate, rotations, split_axes
from soratrain.models.tokens import Spread, Tokens


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


@pytest.fixture(params=["composed", "pieces", "rows alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that norms and gates are taken: composed, as a small pack's; written out, in pieces of 16 tokens."""
    if request.param != "composed":
        monkeypatch.setattr(tokens_of, "PIECE", {"cpu": 512, "gpu": 512})
        monkeypatch.setattr(tokens_of, "COMPOSED", {"cpu": 0, "gpu": 0})
        monkeypatch.setattr(
            tokens_of, "ALONE", {kind: 0 if request.param == "rows alone" else 1 << 30 for kind in ("cpu", "gpu")}
        )
    return str(request.param)


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
@pytest.mark.usefixtures("way")
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
    assert kept[1] < 0.6 * kept[0] and kept[2] < kept[1]  # less by what the policy holds out of sight: see `memory`


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


@pytest.mark.full  # the compiler takes its time
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_compiled_blocks_compute_the_same_and_keep_their_names(recompute: str) -> None:
    plain, compiled = build(depth=1, recompute=recompute), build(depth=1, recompute=recompute)
    assert compile_blocks(compiled) == 1 and list(compiled.state_dict()) == list(plain.state_dict())
    expected, found = step(plain, pack("unequal")), step(compiled, pack("unequal"))
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-4, rtol=1e-3, msg=name)


def exact(x: Tensor) -> Tensor:
    return x.bfloat16().float()


@dataclass
class Case:
    """What goes into a pack's norm and gate, and the gradients of what comes out."""

    spread: Spread
    inputs: list[Tensor]
    ups: list[Tensor]

    def results(self, dtype: torch.dtype, plain: bool = False) -> list[Tensor]:
        """Return norm, gated stream, and the gradients of x, update, shift, scale and gate."""
        x, update, *rows = (value.clone().requires_grad_() for value in self.inputs)
        if not plain:
            norm = self.spread.norm(x.to(dtype), *rows[:2])
            gated = self.spread.gate(x.to(dtype), update.to(dtype), rows[2])
            assert norm.dtype == gated.dtype == dtype
        else:
            owner = self.owner
            norm = F.layer_norm(x, x.shape[-1:], eps=EPS) * (1 + rows[1][owner]) + rows[0][owner]
            gated = x + rows[2][owner] * update
        torch.autograd.backward([norm, gated], [up.to(dtype) for up in self.ups])
        return [norm.detach().float(), gated.detach().float(), *(value.grad for value in (x, update, *rows))]  # type: ignore[misc]

    @property
    def owner(self) -> Tensor:
        """The row of each token."""
        count, rows = len(self.inputs[0]), len(self.inputs[2])
        return torch.arange(rows).repeat_interleave(count // rows) if self.spread.rows is None else self.spread.rows


def case(kind: str, dim: int = 32) -> Case:
    tokens, generator = pack(kind), torch.Generator().manual_seed(0)
    count, rows = tokens.packing.total, len(tokens.sigma)
    x, update, *ups = (exact(torch.randn(count, dim, generator=generator) * 3 + 1) for _ in range(4))
    values = [exact(torch.randn(rows, dim, generator=generator)) for _ in range(3)]
    return Case(Spread.of(tokens, dim), [x, update, *values], ups)


@pytest.mark.parametrize("kind", ["equal", "unequal", "rows"])
def test_norm_and_gate_are_the_plain_formulas_and_so_are_their_gradients_in_bf16_too(way: str, kind: str) -> None:
    of = case(kind)
    assert bool(of.spread.pieces) == (way != "composed")
    assert {type(piece.rows) for piece in of.spread.pieces} <= (
        {int} if way == "rows alone" else {slice} if kind == "equal" else {Tensor}
    )
    expected, names = of.results(torch.float32, plain=True), ("norm", "gated", "x", "update", "shift", "scale", "gate")
    for name, one, other in zip(names, of.results(torch.float32), expected, strict=True):
        assert (one - other).abs().max() <= 1e-6 * other.abs().max(), name
    for name, one, other in zip(names, of.results(torch.bfloat16), expected, strict=True):
        near = 1e-5 if name in ("shift", "scale") else 2**-7  # what is added up over tokens is added up in fp32
        assert (one - other).abs().max() <= near * other.abs().max(), name


class Widest(TorchDispatchMode):
    """Notes the most numbers of any fp32 tensor that is made."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in out if isinstance(out, tuple | list) else (out,):
            if isinstance(made, Tensor) and made.dtype == torch.float32:
                self.numbers = max(self.numbers, made.numel())
        return out


@pytest.mark.parametrize("way", ["pieces", "rows alone"], indirect=True)
@pytest.mark.parametrize("kind", ["equal", "unequal", "rows"])
def test_no_fp32_copy_of_a_pack_is_made_or_kept_for_its_norms_and_gates(way: str, kind: str) -> None:
    of = case(kind)
    x, update = (value.bfloat16().requires_grad_() for value in of.inputs[:2])
    rows = [value.requires_grad_() for value in of.inputs[2:]]
    kept = dict[int, Tensor]()
    with (
        Widest() as widest,
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(id(t), t), lambda t: t),
    ):
        norm, gated = of.spread.norm(x, *rows[:2]), of.spread.gate(x, update, rows[2])
        torch.autograd.backward([norm, gated], [up.bfloat16() for up in of.ups])
    assert 0 < widest.numbers <= max(512, rows[0].numel()) < x.numel()
    own = {value.untyped_storage().data_ptr() for value in (x, update)}
    more = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in kept.values()}
    assert sum(size for place, size in more.items() if place not in own) <= 3 * 4 * rows[0].numel() + 8 * len(x)


def test_how_a_device_s_tokens_are_worked_through_is_settled_without_reading_from_it() -> None:
    """What is on `meta` cannot be read."""
    tokens = pack("unequal")
    far = replace(tokens, values=tokens.values.to("meta"), sigma=tokens.sigma.to("meta"))
    longest = Spread.of(far, 1 << 20).pieces
    assert all(isinstance(piece.rows, int) and piece.count <= 4 for piece in longest)
    assert sum(piece.count for piece in longest) == tokens.packing.total
    for other in (far, replace(far, rows=tokens.packing.owner().to("meta"))):
        assert all(isinstance(piece.rows, Tensor) for piece in Spread.of(other, 64).pieces)


@pytest.mark.parametrize(("full", "turned"), [(False, True), (True, True), (False, False), (True, False)])
def test_norm_and_rotation_of_queries_and_keys_are_fp32_and_have_the_gradients_of_the_plain_formula(
    full: bool, turned: bool
) -> None:
    coords = torch.rand(9, 3) * 50
    rotation = rotations(coords, split_axes(16)) if turned else None
    found: list[list[Tensor]] = []
    for way in ("written out", "composed"):
        torch.manual_seed(0)
        x = torch.randn(9, 2, 3, 16).requires_grad_()
        weight = torch.randn(2, 3 if full else 1, 16).requires_grad_()
        if way == "written out":
            q, k = prepared(x, weight, rotation)
        else:
            dims = (-2, -1) if full else (-1,)
            y = x / (x.square().mean(dims, keepdim=True) + EPS).sqrt() * weight
            q, k = (part if rotation is None else rotate(part, rotation) for part in y.unbind(1))
        (q.square() * k.sin()).sum().backward()
        assert x.grad is not None and weight.grad is not None
        found.append([q.detach(), k.detach(), x.grad, weight.grad])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        rough = prepared(x.bfloat16(), weight, rotation)
    for part, wide in zip(rough, prepared(exact(x.detach()), weight, rotation), strict=True):
        assert torch.equal(part, wide.detach().bfloat16())  # fp32 within, rounded once


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("kind", ["equal", "unequal", "rows"])
def test_bf16_stays_close_to_fp32_with_every_layer_s_condition_in_fp32(kind: str) -> None:
    net, tokens = build(pooled_text=True), pack(kind)
    with torch.no_grad():
        wide = net(tokens, *texts(3))
        with torch.autocast("cpu", torch.bfloat16):
            rough = net(tokens, *texts(3))
    assert rough.dtype == torch.bfloat16 and (rough.float() - wide).abs().mean() < 0.04 * wide.abs().mean()
