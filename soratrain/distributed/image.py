"""A copy of tensors in the CPU's memory, laid out as their file will be."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress

import torch
from torch import Tensor

from soratrain.amounts import memory as amount
from soratrain.models.tensor_file import Layout

log = logging.getLogger(__name__)


class Image:
    """Memory that is taken once and used for every copy; page-locked where tensors lie on a GPU.

    A GPU copies in the order of its own work: what it computes next waits for the copy, the CPU does not. Where memory
    cannot be locked, the CPU waits too.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.locked = False
        self.said = False

    def take(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
        """Copy `tensors`; return the bytes after the file's header, whose first waits for the GPU."""
        devices = cards(tensors)
        if self.memory is None or self.memory.numel() != layout.nbytes:
            self.free()
            self.memory = torch.empty(layout.nbytes, dtype=torch.uint8)
            if devices:
                self.locked = lock(self.memory, devices)
                if not self.locked and not self.said:
                    self.said = True
                    log.warning(
                        "%s of the CPU's memory could not be page-locked (see ulimit -l): training waits a little"
                        " longer while a checkpoint is copied",
                        amount(layout.nbytes),
                    )
        for name, start in layout.starts.items():
            tensor = tensors[name].detach()
            place = self.memory[start : start + tensor.nbytes].view(tensor.dtype)
            place.copy_(tensor.reshape(-1), non_blocking=self.locked)
        return _when_copied(self.memory, events_on(devices))

    def free(self) -> None:
        """Give the memory back; nothing may be reading it."""
        if self.locked and self.memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self.memory, self.locked = None, False


def cards(tensors: Mapping[str, Tensor]) -> set[torch.device]:
    """Return the GPUs on which tensors lie."""
    return {tensor.device for tensor in tensors.values() if tensor.is_cuda}


def events_on(devices: Iterable[torch.device]) -> list[torch.cuda.Event]:
    """Return an event of each GPU that comes when all that it has been given so far is done."""
    return [torch.cuda.current_stream(device).record_event() for device in devices]


def lock(memory: Tensor, devices: Iterable[torch.device]) -> bool:
    """Page-lock memory for GPUs; return whether that could be done.

    Not torch's own page-locked memory, which is taken in powers of two.
    """
    if int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0:
        return True
    for device in devices:  # the error stays, and the next kernel would be blamed: this one is
        with suppress(RuntimeError):
            torch.ones(1, device=device)
    return False


def _when_copied(memory: Tensor, events: list[torch.cuda.Event]) -> Iterator[memoryview]:
    for event in events:
        event.synchronize()
    yield memory.numpy().data
