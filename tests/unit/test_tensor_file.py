"""Files written tensor by tensor are those of the format's own library."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from soratrain.errors import DataError
from soratrain.models import tensor_file, weights
from soratrain.models.tensor_file import DTYPES, Form, Layout
from soratrain.models.text import ByteTextEncoder

FACTORY = partial(ByteTextEncoder, dim=32, depth=1, num_heads=2, mlp_ratio=2.0, table=64, max_tokens=16)


def test_every_type_is_written_as_the_library_writes_it(tmp_path: Path) -> None:
    tensors = {}
    for dtype in DTYPES:
        value = torch.arange(6).to(dtype).reshape(2, 3)
        tensors |= {f"z {dtype}": value, f"a.{dtype}": value.clone(), f'"é\\{dtype}': value[0, 0].clone()}
    tensors["empty"] = torch.zeros(0, 4)
    save_file(tensors, str(tmp_path / "theirs"))
    layout = Layout.of({name: Form.of(tensor) for name, tensor in tensors.items()})
    pieces = (tensor_file.raw(tensors[name]) for name in layout.starts)
    size, crc = tensor_file.write(tmp_path / "ours", layout.header, pieces)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    from soratrain.distributed.checkpoint import crc32

    assert size == (tmp_path / "ours").stat().st_size and crc == crc32(tmp_path / "ours")


def write(folder: Path, net: nn.Module, largest: int) -> None:
    state = net.state_dict()
    forms = {name: Form.of(tensor) for name, tensor in state.items()}
    tensors = ((name, state[name]) for name in tensor_file.in_order(forms))
    weights.write(folder, "text", forms, tensors, FACTORY, {"step": 3}, largest=largest)


def test_a_net_in_several_files_is_the_net_in_one(tmp_path: Path) -> None:
    net = FACTORY()
    write(tmp_path / "one", net, 10**9)
    write(tmp_path / "many", net, 9000)
    names = sorted(path.name for path in (tmp_path / "many").glob("*.safetensors"))
    assert len(names) > 2 and names[0] == f"text-00001-of-{len(names):05d}.safetensors"
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == ["text.safetensors", "text.yaml"]
    save_file(dict(net.state_dict()), str(tmp_path / "theirs"))
    assert (tmp_path / "theirs").read_bytes() == (tmp_path / "one" / "text.safetensors").read_bytes()
    parts = [load_file(tmp_path / "many" / name) for name in names]
    index = json.loads((tmp_path / "many" / "text.safetensors.index.json").read_text())
    assert index["weight_map"] == {key: name for name, part in zip(names, parts, strict=True) for key in sorted(part)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in net.state_dict().values())
    assert all(sum(t.nbytes for t in part.values()) <= 9000 or len(part) == 1 for part in parts)
    for folder in ("one", "many"):
        again, extra = weights.load(tmp_path / folder, "text")
        assert extra == {"step": 3} and weights.digest(again) == weights.digest(net)


def test_diffusers_own_reader_of_sharded_files_reads_ours(tmp_path: Path) -> None:
    from transformers.modeling_utils import load_state_dict  # the reader behind `from_pretrained`

    net = FACTORY()
    write(tmp_path, net, 9000)
    found = {}
    for file in weights.files(tmp_path, "text"):
        found |= load_state_dict(str(file))
    assert all(torch.equal(found[name], tensor) for name, tensor in net.state_dict().items())


def test_writing_again_in_another_number_of_files_leaves_none_of_the_old(tmp_path: Path) -> None:
    for largest in (9000, 30_000, 10**9, 9000):
        net = FACTORY()
        write(tmp_path, net, largest)
        stated = weights.files(tmp_path, "text")
        assert sorted(tmp_path.glob("*.safetensors")) == stated
        assert (tmp_path / "text.safetensors.index.json").exists() is (len(stated) > 1)
        assert weights.digest(weights.load(tmp_path, "text")[0]) == weights.digest(net)


def test_a_file_that_is_missing_and_a_damaged_index_are_one_line(tmp_path: Path) -> None:
    write(tmp_path, FACTORY(), 9000)
    index = tmp_path / "text.safetensors.index.json"
    text = index.read_text()
    weights.files(tmp_path, "text")[1].unlink()
    with pytest.raises(DataError, match=r"text-00002-of-0000\d\.safetensors cannot be read"):
        weights.load(tmp_path, "text")
    index.write_text(text.replace("text-00001", "../text-00001"))
    with pytest.raises(DataError, match="outside their folder"):
        weights.load(tmp_path, "text")
    index.write_text("{}")
    with pytest.raises(DataError, match=r"index\.json cannot be read"):
        weights.load(tmp_path, "text")


def test_what_was_written_does_not_stay_in_the_page_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_file, "WINDOW", 1 << 22)
    if tmp_path.stat().st_dev == Path("/dev/shm").stat().st_dev:
        pytest.skip("a file system in memory keeps everything there")
    let_go: list[tuple[int, int]] = []
    real = os.posix_fadvise
    monkeypatch.setattr(os, "posix_fadvise", lambda *given: (let_go.append(given[1:3]), real(*given)), raising=False)
    data = memoryview(os.urandom(11 << 20))
    size, _ = tensor_file.write(tmp_path / "file", b"header  ", iter([data[: 5 << 20], data[5 << 20 :]]))
    assert (tmp_path / "file").read_bytes() == b"header  " + bytes(data) and size == 8 + len(data)
    starts = [start for start, _ in let_go]
    assert len(starts) >= 3 and starts == sorted(starts) and starts[0] == 0


@pytest.mark.parametrize("error", [OSError(95, "Operation not supported"), AttributeError("posix_fadvise")])
def test_a_file_is_written_where_the_page_cache_takes_no_advice(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: int) -> None:
        raise error

    monkeypatch.setattr(os, "posix_fadvise", refuse, raising=False)
    assert tensor_file.write(tmp_path / "file", b"header  ", iter([memoryview(b"data")]))[0] == 12
    assert (tmp_path / "file").read_bytes() == b"header  data"
