"""Promises of packed attention: one result, whichever back end."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from soratrain.models.attention import Packing, attend, choose

RAGGED = (Packing.of([5, 1, 9]), Packing.of([2, 7, 1]))
EQUAL = (Packing.of([6, 6]), Packing.of([3, 3]))
BACKENDS = ["dense", "loop", pytest.param("varlen", marks=pytest.mark.gpu)]


def tokens(q: Packing, k: Packing, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = (q.total, k.total, k.total)
    return [torch.randn(size, 2, 16, generator=generator).to(dtype).requires_grad_() for size in sizes]


def by_hand(qkv: list[Tensor], q: Packing, k: Packing) -> Tensor:
    outs = []
    parts = zip(qkv[0].split(q.lengths), qkv[1].split(k.lengths), qkv[2].split(k.lengths), strict=True)
    for queries, keys, values in parts:
        scores = torch.einsum("nhk,mhk->hnm", queries.double(), keys.double()) / 4
        outs.append(torch.einsum("hnm,mhk->nhk", scores.softmax(-1), values.double()))
    return torch.cat(outs)


@pytest.mark.parametrize(
    "packings", [RAGGED, EQUAL, (RAGGED[0], EQUAL[1].of([3, 3, 3])), (Packing.of([4] * 3), RAGGED[1])]
)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_back_end_gives_the_attention_of_each_segment_alone(
    packings: tuple[Packing, Packing], backend: str, dtype: torch.dtype
) -> None:
    device = "cuda" if backend == "varlen" else "cpu"
    if backend == "varlen" and (dtype == torch.float32 or not torch.cuda.is_available()):
        pytest.skip("varlen attention is for CUDA in 16 bits")
    qkv = tokens(*packings, dtype)
    out = attend(*(x.to(device) for x in qkv), *packings, backend=backend).cpu()
    tolerance = {"atol": 1e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 8e-2, "rtol": 8e-2}
    torch.testing.assert_close(out.double(), by_hand(qkv, *packings), **tolerance)
    out.square().sum().backward()
    got = [x.grad.clone() for x in qkv]
    by_hand(exact := tokens(*packings, dtype), *packings).square().sum().backward()
    for mine, reference in zip(got, exact, strict=True):
        torch.testing.assert_close(mine, reference.grad, **tolerance)


@pytest.mark.parametrize("backend", ["dense", "loop"])
def test_a_segment_of_nan_leaves_the_others_untouched(backend: str) -> None:
    q, k = RAGGED
    clean = tokens(q, k)
    out = attend(*clean, q, k, backend=backend)
    spoilt = [x.detach().clone() for x in clean]
    spoilt[0][5:6], spoilt[1][2:9], spoilt[2][2:9] = torch.nan, torch.nan, torch.nan
    other = attend(*spoilt, q, k, backend=backend)
    assert other[5:6].isnan().all()
    assert torch.equal(other[:5], out[:5]) and torch.equal(other[6:], out[6:])


def test_long_unequal_segments_are_taken_one_by_one_and_short_ones_padded() -> None:
    q = torch.zeros(1, 2, 16)
    assert choose(q, Packing.of([4000, 10]), Packing.of([5, 9])) == "loop"
    assert choose(q, Packing.of([40, 10]), Packing.of([5, 9])) == "dense"
    assert choose(q, Packing.of([4000, 4000]), Packing.of([5, 5])) == "dense"


def test_padding_and_unpadding_round_trip_and_means_are_per_segment() -> None:
    packing = RAGGED[0]
    x = torch.randn(packing.total, 3)
    assert torch.equal(packing.unpad(packing.pad(x)), x)
    expected = torch.stack([part.mean(0) for part in x.split(packing.lengths)])
    torch.testing.assert_close(packing.mean(x), expected)
    rows = torch.arange(3.0)[:, None]
    assert packing.expand(rows)[:, 0].tolist() == [0.0] * 5 + [1.0] + [2.0] * 9
