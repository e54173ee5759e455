"""Weights on disk rebuild the very same network, and nothing else."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import yaml

from soratrain.errors import ConfigError, DataError
from soratrain.models import weights
from soratrain.models.text import ByteTextEncoder

FACTORY = partial(ByteTextEncoder, dim=32, depth=1, num_heads=2, mlp_ratio=2.0, table=64, max_tokens=16)


def test_a_saved_net_comes_back_bit_for_bit_with_its_values(tmp_path):
    net = FACTORY()
    weights.save(tmp_path / "weights", "text", net, FACTORY, {"step": 3})
    again, extra = weights.load(tmp_path, "text")
    assert extra == {"step": 3} and not again.training
    for (name, one), (other, two) in zip(net.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other and torch.equal(one, two)


def test_a_factory_of_a_factory_is_stored_as_one(tmp_path):
    class Deferred(partial):
        """A subclass, which functools does not flatten by itself."""

    nested = partial(Deferred(ByteTextEncoder, dim=32, depth=1), dim=64)
    spec = weights.spec_of(nested)
    assert spec["target"] == "soratrain.models.text.ByteTextEncoder"
    assert spec["kwargs"] == {"dim": 64, "depth": 1}


def test_weights_that_do_not_fit_are_refused_naming_the_keys(tmp_path):
    weights.save(tmp_path, "text", FACTORY(), FACTORY, {})
    document = yaml.safe_load((tmp_path / "text.yaml").read_text())
    document["kwargs"]["depth"] = 2
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(document))
    with pytest.raises(DataError, match="do not fit ByteTextEncoder: missing"):
        weights.load(tmp_path, "text")


def test_reading_weights_never_runs_foreign_code(tmp_path):
    weights.save(tmp_path, "text", FACTORY(), FACTORY, {})
    (tmp_path / "text.yaml").write_text(yaml.safe_dump({"target": "os.system", "kwargs": {"command": "true"}}))
    with pytest.raises(ConfigError, match=r"only classes of soratrain are loaded"):
        weights.load(tmp_path, "text")


def test_missing_weights_are_named_with_the_folder(tmp_path):
    with pytest.raises(DataError, match="no weights of 'vae' in"):
        weights.load(tmp_path, "vae")


def test_damaged_weights_and_a_place_that_takes_none_are_one_line(tmp_path):
    weights.save(tmp_path, "text", FACTORY(), FACTORY, {})
    path = tmp_path / "text.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=r"text\.safetensors cannot be read .*; copy or train them again"):
        weights.load(tmp_path, "text")
    (tmp_path / "text.yaml").write_text("target: [")
    with pytest.raises(DataError, match=r"text\.yaml cannot be read"):
        weights.load(tmp_path, "text")
    with pytest.raises(DataError, match="were not written"):
        weights.save(path / "below a file", "text", FACTORY(), FACTORY, {})
