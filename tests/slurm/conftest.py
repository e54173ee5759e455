"""One real SLURM for all tests of this folder, or a reason why there is none."""

from __future__ import annotations

from collections.abc import Iterator

import cluster as local
import pytest


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[local.Cluster]:
    if reason := local.why_not():
        pytest.skip(f"no SLURM here: {reason}")
    with local.cluster(tmp_path_factory.mktemp("slurm")) as found:
        yield found
