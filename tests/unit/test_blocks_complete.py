"""What a sharding strategy relies on: a part that is put into a list of parts is complete."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from soratrain.compose import compose
from soratrain.run import instantiate

NETS = [("dit", ()), ("text", ()), ("vae", ()), ("captioner", ()), ("dit", ("dit.pooled_text=true",))]


def test_nobody_initializes_a_block_once_it_stands_in_its_list() -> None:
    for name, words in NETS:
        config, _ = compose(["stage=dit", "machine=laptop", *words])
        factory = instantiate(config[name])
        seen: list[tuple[str, torch.Tensor, torch.Tensor]] = []

        def keep(parent: nn.Module, key: str, module: nn.Module | None, seen: list = seen) -> None:
            if isinstance(parent, nn.ModuleList) and module is not None:
                seen.extend((key, param, param.detach().clone()) for param in module.parameters())

        handle = register_module_module_registration_hook(keep)
        try:
            net = factory()
        finally:
            handle.remove()
        assert seen, name
        own = {id(param) for param in net.parameters()}
        for key, param, before in seen:
            assert id(param) in own and torch.equal(param, before), f"{name}: {key}"
