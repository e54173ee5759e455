"""Promises of the DiT on CUDA: it computes what it computes on a CPU, however its norms and gates are taken."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from soratrain.callbacks.compiled import compile_blocks
from soratrain.diffusion.segments import Segment, flatten
from soratrain.models import tokens as tokens_of
from soratrain.models.attention import Packing
from soratrain.models.dit import DiT
from soratrain.models.tokens import Tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
RAGGED = [(4, 2, 8, 8), (4, 1, 8, 12), (4, 5, 4, 8)]
TEXT = Packing.of([3, 1, 5])


def pack(kind: str, device: str) -> Tokens:
    """Return equal clips, unequal ones, or ones with rows of their own for every other token."""
    generator = torch.Generator().manual_seed(1)
    shapes = RAGGED[:1] * 3 if kind == "equal" else RAGGED
    clips = [Segment(torch.randn(shape, generator=generator), torch.tensor(0.4), 24.0) for shape in shapes]
    found = flatten([[clip] for clip in clips], (1, 2, 2)).tokens
    if kind == "rows":
        owner = found.packing.owner()
        sigma, clips_of = torch.cat((found.sigma, found.sigma / 2)), found.row_clips.repeat(2)
        found = replace(found, sigma=sigma, row_clips=clips_of, rows=owner + 3 * (torch.arange(len(owner)) % 2))
    moved = {name: value.to(device) for name, value in vars(found).items() if isinstance(value, Tensor)}
    return replace(found, **moved)


def step(kind: str, device: str, *, compiled: bool = False) -> dict[str, Tensor]:
    """Return the output and the gradient of every parameter, on the CPU."""
    torch.manual_seed(0)
    net = DiT(channels=4, dim=128, depth=2, num_heads=2, text_dim=16)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    net = net.to(device)
    if compiled:
        compile_blocks(net)
    text = torch.randn(TEXT.total, 16, generator=torch.Generator().manual_seed(2)).to(device)
    out = net(pack(kind, device), text, TEXT)
    out.square().mean().backward()
    grads = {name: parameter.grad.cpu() for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(list(net.parameters()))
    return {"out": out.detach().cpu(), **grads}


@pytest.fixture(params=["composed", "pieces", "rows alone"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The way that norms and gates are taken on the GPU."""
    if request.param == "composed":
        monkeypatch.setitem(tokens_of.COMPOSED, "gpu", 1 << 30)
        monkeypatch.setitem(tokens_of.ALONE, "gpu", 1 << 30)
    else:
        monkeypatch.setitem(tokens_of.PIECE, "gpu", 16 * 128)
        monkeypatch.setitem(tokens_of.COMPOSED, "gpu", 0)
        monkeypatch.setitem(tokens_of.ALONE, "gpu", 0 if request.param == "rows alone" else 1 << 30)
    return str(request.param)


@pytest.mark.parametrize("kind", ["equal", "ragged", "rows"])
def test_a_step_in_fp32_is_that_of_a_cpu_whichever_way_norms_and_gates_are_taken(kind: str, way: str) -> None:
    expected = step(kind, "cpu")
    for name, found in step(kind, "cuda").items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}")


@pytest.mark.parametrize("kind", ["equal", "ragged", "rows"])
def test_compiled_blocks_give_a_cpu_s_step(kind: str) -> None:
    expected = step(kind, "cpu")
    for name, found in step(kind, "cuda", compiled=True).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-3, atol=1e-5, msg=lambda said, n=name: f"{n}: {said}")
