"""A copy of tensors in the CPU's memory, laid out as their file will be."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from soratrain.models.tensor_file import Layout


class Image:
    """Memory that is taken once and used for every copy; page-locked where tensors lie on a GPU.

    A GPU copies in the order of its own work: what it computes next waits for the copy, the CPU does not.
    """

    def __init__(self) -> None:
        self.memory: Tensor | None = None
        self.locked = False

    def take(self, layout: Layout, tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
        """Copy `tensors`; return the bytes after the file's header, whose first waits for the GPU."""
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        if self.memory is None or self.memory.numel() != layout.nbytes:
            self.free()
            self.memory = torch.empty(layout.nbytes, dtype=torch.uint8)
            if devices:
                # Not torch's own page-locked memory, which is taken in powers of two.
                torch.cuda.cudart().cudaHostRegister(self.memory.data_ptr(), layout.nbytes, 0)
                self.locked = True
        for name, start in layout.starts.items():
            tensor = tensors[name].detach()
            place = self.memory[start : start + tensor.nbytes].view(tensor.dtype)
            place.copy_(tensor.reshape(-1), non_blocking=True)
        events = [torch.cuda.current_stream(device).record_event() for device in devices]
        return _when_copied(self.memory, events)

    def free(self) -> None:
        """Give the memory back; nothing may be reading it."""
        if self.locked and self.memory is not None:
            torch.cuda.cudart().cudaHostUnregister(self.memory.data_ptr())
        self.memory, self.locked = None, False


def _when_copied(memory: Tensor, events: list[torch.cuda.Event]) -> Iterator[memoryview]:
    for event in events:
        event.synchronize()
    yield memory.numpy().data
