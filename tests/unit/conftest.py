"""Shards that several files' tests only read."""

from __future__ import annotations

import pytest
from data_tiny import write_clips, write_latents
from loading import SHAPES


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> str:
    return str(write_clips(tmp_path_factory.mktemp("clips"), SHAPES, max_bytes=20_000))


@pytest.fixture(scope="session")
def latents(tmp_path_factory) -> str:
    return str(write_latents(tmp_path_factory.mktemp("latents"), SHAPES))
