"""What a benchmark needs and a machine may not have."""

from __future__ import annotations

import torch


class MissingError(Exception):
    """A benchmark cannot be measured here; says what is missing, in one line."""


def a_gpu() -> None:
    """Refuse a machine without a CUDA device."""
    if not torch.cuda.is_available():
        raise MissingError("no CUDA device is here")
