"""Promises of products of few rows: a layer's own result, whatever its size and type, and weights left as they are."""

from __future__ import annotations

import platform

import pytest
import torch
from captioner_tiny import captioner
from torch import nn

from soratrain.models import few_rows
from soratrain.models.few_rows import Ordered


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "wide"), [(1, 512), (8, 512), (3, 8)])
def test_a_product_is_the_layers_own(rows: int, wide: int, dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(wide, 2 * wide, bias=bias, dtype=dtype), torch.randn(rows, wide, dtype=dtype)
    product, before = Ordered(rows), layer.weight.clone()
    with torch.inference_mode():
        for _ in range(2):
            found = product(x, layer)
            torch.testing.assert_close(found, layer(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)
            assert found.dtype == dtype
    assert torch.equal(layer.weight, before)
    ordered = product.found[layer] is not None
    assert ordered is (few_rows.can(x, layer.weight) and wide == 512)
    if (platform.system(), platform.machine(), dtype, wide) == ("Linux", "x86_64", torch.float32, 512):
        assert ordered  # else the operators have other names, and nobody would see that it is slow


def test_captions_are_the_same_where_no_weight_is_put_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    net = captioner(max_bytes=24)
    pooled, styles, found = torch.randn(4, 3, 16), torch.tensor([0, 1, 0, 1]), []
    for least in (1, 10**9):
        monkeypatch.setattr(few_rows, "LEAST", least)
        found.append(net.decoder.write(pooled, styles, max_bytes=24))
    assert found[0] == found[1] and any(len(text) > 5 for text in found[0][0])


def test_under_autocast_a_layer_casts_as_it_always_does() -> None:
    layer, x = nn.Linear(512, 512), torch.randn(2, 512)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(Ordered(2)(x, layer), layer(x))
