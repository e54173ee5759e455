"""Computing with a stage's nets between two steps without leaving a trace in the training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def apart(*nets: nn.Module) -> Iterator[None]:
    """Inside the block no gradients are kept, `nets` are in eval mode, and random numbers are drawn from a copy.

    Not `inference_mode`: under ZeRO-3 a forward gathers parameters, which could not be trained after that.
    """
    modes = [{name: module.training for name, module in net.named_modules()} for net in nets]
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            for net in nets:
                net.eval()
            yield
    finally:
        for net, before in zip(nets, modes, strict=True):
            for name, module in net.named_modules():
                module.training = before[name]
        if devices:
            torch.cuda.empty_cache()
