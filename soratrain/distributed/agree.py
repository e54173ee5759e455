"""What all ranks must hold alike, compared once: a rank with other data would train on, wrong or forever waiting."""

from __future__ import annotations

import json
import socket
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from soratrain.distributed import halt
from soratrain.errors import DataError

KEY = "soratrain/agree"


def agree(name: str, values: Mapping[str, Any]) -> None:
    """Compare `values` with rank 0's, in every process that trains; `name` is used once in a run.

    Raises:
        DataError: they differ; all other ranks then stop as well.
    """
    if not halt.together():
        return
    halt.watch()
    store = _get_default_store()
    if dist.get_rank() == 0:
        store.set(f"{KEY}/{name}", json.dumps([socket.gethostname(), dict(values)]))
        return
    host, first = json.loads(store.get(f"{KEY}/{name}"))
    differing = [key for key, value in values.items() if first.get(key) != value]
    if differing:
        key = differing[0]
        reason = (
            f"{key} is {values[key]} on rank {dist.get_rank()} ({socket.gethostname()}), {first.get(key)} on rank 0"
            f" ({host}): they do not see the same data; are the shards the same on every node?"
        )
        halt.announce(reason)
        raise DataError(reason)
