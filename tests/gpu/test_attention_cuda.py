"""Promises of attention on CUDA: its three back ends agree in 16 bits, and so does the whole net in packs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soratrain.callbacks.compiled import compile_blocks
from soratrain.diffusion.segments import Segment, flatten
from soratrain.models.attention import Packing, attend, choose
from soratrain.models.dit import DiT

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
RAGGED = Packing.of([130, 1, 77, 256])
TEXT = Packing.of([12, 64, 1, 33])
EQUAL = Packing.of([96] * 4)


def inputs(q: Packing, k: Packing, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (q.total, k.total, k.total)
    return [torch.randn(size, 2, 64, generator=generator).to("cuda", dtype).requires_grad_() for size in sizes]


def results(backend: str, q: Packing, k: Packing, dtype: torch.dtype) -> list[Tensor]:
    """Return the output and the gradients of queries, keys and values, fp32."""
    qkv = inputs(q, k, dtype)
    out = attend(*qkv, q, k, backend=backend)
    out.float().square().sum().backward()
    return [out.detach().float(), *(x.grad.float() for x in qkv if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("packings", [(RAGGED, RAGGED), (RAGGED, TEXT), (EQUAL, EQUAL), (EQUAL, TEXT)])
def test_varlen_dense_and_loop_agree_in_outputs_and_gradients(
    packings: tuple[Packing, Packing], dtype: torch.dtype
) -> None:
    exact = results("loop", *packings, torch.float32)
    for backend in ("varlen", "dense", "loop"):
        for found, expected in zip(results(backend, *packings, dtype), exact, strict=True):
            assert (found - expected).norm() < 0.02 * expected.norm(), backend


def test_ragged_packs_in_16_bits_take_varlen() -> None:
    q = inputs(RAGGED, RAGGED, torch.bfloat16)[0]
    assert choose(q, RAGGED, TEXT) == "varlen" and choose(q, EQUAL, EQUAL) == "dense"


@pytest.mark.parametrize(
    ("recompute", "compiled"),
    [("none", False), ("selective", False), ("full", False), ("none", True), ("full", True)],
)
def test_a_pack_in_bf16_is_near_its_clips_one_by_one_in_fp32(recompute: str, compiled: bool) -> None:
    torch.manual_seed(0)
    net = DiT(channels=4, dim=128, depth=2, num_heads=2, text_dim=16, recompute=recompute).cuda()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    shapes = [(4, 2, 8, 8), (4, 1, 8, 12), (4, 5, 4, 8)]
    segments = [Segment(torch.randn(shape, device="cuda"), torch.tensor(0.4), 24.0) for shape in shapes]
    packing = Packing.of([3, 1, 5])
    text = torch.randn(packing.total, 16, device="cuda")
    pairs = zip(segments, text.split(packing.lengths), strict=True)
    alone = [net(flatten([[one]], net.patch).tokens, words, Packing.of([len(words)])) for one, words in pairs]
    torch.cat(alone).square().mean().backward()
    exact = {name: parameter.grad.clone() for name, parameter in net.named_parameters()}
    net.zero_grad()
    if compiled:
        compile_blocks(net)
    with torch.autocast("cuda", torch.bfloat16):
        out = net(flatten([[one] for one in segments], net.patch).tokens, text, packing)
    out.float().square().mean().backward()
    assert (out.float() - torch.cat(alone)).norm() < 0.03 * torch.cat(alone).norm()
    for name, parameter in net.named_parameters():
        assert (parameter.grad - exact[name]).norm() < 0.1 * exact[name].norm() + 1e-6, name
