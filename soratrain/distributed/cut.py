"""Nets whose parameters exist in slices only (ZeRO-3), each part cut up as soon as it is built.

A part is what is put into an `nn.ModuleList`: a block is complete by then, and nobody initializes it afterwards. So a
rank never holds more than its slices, one block, and what belongs to no block. What initial weights are does not depend
on it: every strategy draws the same numbers in the same order. (Inside DeepSpeed's own `zero.Init` each layer is cut up
before its parent can initialize it: zero-initialized outputs would silently not be zero.) Others' nets, which do
initialize a block that stands in its list, are built whole (`hf_tower.built_whole`) and then cut up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from soratrain.models.hf_tower import WHOLE


@contextmanager
def cut_up_as_built(config: Any, weights: torch.dtype) -> Iterator[None]:
    """Cut up every part of the nets that are built inside the block; `cut_up` does the rest of a net."""

    def cut(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        if isinstance(parent, nn.ModuleList) and module is not None and not WHOLE.get():
            cut_up(module, config, weights)

    handle = register_module_module_registration_hook(cut)
    try:
        yield
    finally:
        handle.remove()


def cut_up(net: nn.Module, config: Any, weights: torch.dtype) -> None:
    """Leave each rank its slice of every parameter of `net`, which all ranks have built alike.

    Where weights are kept in fewer bits than fp32, a trained parameter's `exact` is that slice in fp32, on the CPU:
    what an optimizer that updates weights in fp32 begins from.

    Args:
        config: DeepSpeed's.
        weights: type in which they are kept.
    """
    import deepspeed

    class Init(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            whole = param.data
            param.data = whole.to(weights)
            if param.dim():
                super()._zero_init_param(param)
            else:  # DeepSpeed would broadcast it as bytes, which a tensor without dimensions cannot be viewed as
                torch.distributed.broadcast(param.data, 0)
                self._convert_to_deepspeed_param(param)
                param.partition()
            if weights != torch.float32 and param.requires_grad:
                param.exact = own_slice(param, whole, torch.distributed.get_rank()).to("cpu", torch.float32, copy=True)

    Init(module=net, config_dict_or_path=config)


def fill(param: Any, values: Tensor, rank: int) -> None:
    """Set a parameter that is cut up to whole `values`: this rank's slice of them."""
    own = own_slice(param, values, rank)
    param.ds_tensor.data.view(-1)[: own.numel()].copy_(own)
    if hasattr(param, "exact"):
        param.exact.copy_(own)


def own_slice(param: Any, values: Tensor, rank: int) -> Tensor:
    """Return a rank's slice, flat and without its padding, of the whole `values` of a parameter that is cut up."""
    start = param.ds_tensor.ds_numel * rank
    return values.detach().reshape(-1)[start : start + param.ds_tensor.ds_numel]
