"""Promises of mixing data sets: shares as asked, each sample read from its own folder, captions of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import yaml
from data_tiny import key, write_latents
from loading import cached, same
from range_server import serving

from soratrain.compose import LIST_KEYS, TEXT_KEYS
from soratrain.data.manifest import write_captions
from soratrain.data.reading import read_manifest
from soratrain.errors import ConfigError, DataError
from soratrain.outputs import bind_upstream
from soratrain.quoting import quote
from soratrain.run import prepare
from soratrain.upstream import needed


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[str]:
    import data_tiny

    place, original = tmp_path_factory.mktemp("mix"), data_tiny.key
    found = []
    for start, shapes in ((0, [(32, 32, 9)] * 30), (1000, [(32, 32, 9)] * 12 + [(32, 48, 9)] * 6)):
        data_tiny.key = lambda number, start=start: original(number + start)
        found.append(str(write_latents(place / f"set {start}", shapes)))
    data_tiny.key = original
    return found


def test_each_data_set_has_the_share_it_is_given_and_its_samples_are_its_own(folders):
    data = cached(folders, mix=[1, 3], batch_size=1)
    seen = Counter()
    for batch in data.loader(0, 400):
        number = int(batch.keys[0], 16)
        seen[number >= 1000] += 1
        assert (batch.latents[0] == float(number % 1000)).all()
    assert seen[True] / 400 == pytest.approx(0.75, abs=0.01)
    plain = Counter(int(batch.keys[0], 16) >= 1000 for batch in cached(folders, batch_size=1).loader(0, 480))
    assert plain[True] / 480 == pytest.approx(18 / 48, abs=0.01)


def test_workers_and_packs_change_nothing_in_a_mix(folders):
    for options in ({}, dict(batching="pack", batch_size=None, tokens_per_batch=60)):
        one, two = (list(cached(folders, mix=[1, 1], workers=workers, **options).loader(0, 6)) for workers in (0, 2))
        assert all(same(a, b) for a, b in zip(one, two, strict=True))
    assert any(len({int(name, 16) >= 1000 for name in batch.keys}) == 2 for batch in one), "a pack holds of both"


@pytest.mark.parametrize("workers", [0, 1])
def test_some_of_the_data_sets_may_be_in_a_store(folders, workers):
    local = list(cached(folders, mix=[1, 1]).loader(0, 6))
    with serving(Path(folders[1])) as server:
        far = list(cached([folders[0], server.url], mix=[1, 1], workers=workers).loader(0, 6))
        assert all(same(a, b) for a, b in zip(local, far, strict=True)) and server.asked


def test_one_folder_alone_is_ordered_as_if_it_were_given_bare(folders):
    one, two = cached(folders[0]).loader(0, 10), cached([folders[0]]).loader(0, 10)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))


def test_captions_of_each_set_may_lie_in_folders_of_their_own(folders, tmp_path):
    for start, count in ((0, 30), (1000, 18)):
        rows = [
            dict(key=key(start + number), type="long", text=f"made {start + number}", model="m", rev="r", lang="en")
            for number in range(count)
        ]
        write_captions(tmp_path / str(start) / "captions" / "r" / "part-00000.parquet", rows)
    captions = [str(tmp_path / "0"), str(tmp_path / "1000")]
    for batch in cached(folders, captions=captions, caption_mix={"synthetic": 1.0}).loader(0, 20):
        assert list(batch.captions) == [f"made {int(name, 16)}" for name in batch.keys]


@pytest.mark.parametrize("mix", [[1.0], [1.0, 0.0], [0.5, 0.25, 0.25]])
def test_weights_that_do_not_fit_are_refused(folders, mix):
    with pytest.raises(ConfigError, match=r"data.mix=.*one positive number for each data set"):
        cached(folders, mix=mix).plan()


def test_a_sample_that_is_in_both_is_refused(folders):
    with pytest.raises(DataError, match="occurs twice in .*: data sets that are mixed must hold different samples"):
        read_manifest(folders[0], folders[0])


def test_lists_of_folders_pass_through_the_command_line_and_are_bound_each(folders, tmp_path):
    words = quote(["inputs.latents=[a b, c]", "inputs.vae=[x]"], TEXT_KEYS, LIST_KEYS)
    assert words == ['inputs.latents=["a b","c"]', 'inputs.vae="[x]"'] == quote(words, TEXT_KEYS, LIST_KEYS)
    latents = quote([f"inputs.latents=[{folders[0]},{folders[1]}]"], TEXT_KEYS, LIST_KEYS)
    config, _ = prepare(["stage=dit", "machine=laptop", "inputs.captions=null", "data.mix=[0.7,0.3]", *latents])
    assert needed(config) == [("latents", folder) for folder in folders]
    assert config["stage"]["data"]["latents"] == folders and config["stage"]["data"]["mix"] == [0.7, 0.3]
    tmp_path.joinpath("out").mkdir()
    bind_upstream(tmp_path / "out", needed(config))
    assert sorted(yaml.safe_load((tmp_path / "out" / "upstream.yaml").read_text())) == ["latents[0]", "latents[1]"]
