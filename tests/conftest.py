"""What all tests share."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session", autouse=True)
def node_dir() -> Iterator[None]:
    """Let the tables that processes share lie in a folder that goes with the tests."""
    folder = tempfile.mkdtemp(prefix="soratrain-node-")
    os.environ["SORATRAIN_NODE_DIR"] = folder
    yield
    shutil.rmtree(folder, ignore_errors=True)
