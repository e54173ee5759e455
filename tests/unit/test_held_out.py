"""Promises of holding samples out: they are never trained on, and which they are depends on their keys alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from data_tiny import key, manifest, write_clips, write_latents
from loading import cached, video

from soratrain.data.held_out import REASON, HeldOut, chosen
from soratrain.errors import ConfigError, DataError

SHAPES = [(32, 32, 9)] * 18 + [(32, 48, 9)] * 10 + [(32, 32, 1)] * 12
THREE = HeldOut(clips=3)


def held_keys(data) -> set[str]:
    return {data.held().read(number).keys[0] for number in range(len(data.held()))}


def trained_keys(data, ranks: int, micros: int = 40) -> set[str]:
    found = set()
    for rank in range(ranks):
        data.seat, data._items = (rank, ranks), None
        found |= {name for number in range(micros) for name in data.items()[number].keys}
    return found


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> str:
    return str(write_latents(tmp_path_factory.mktemp("held") / "latents", SHAPES))


@pytest.mark.parametrize("batching", ["bucket", "pack"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_held_out_samples_are_never_trained_on_and_all_others_are(latents: str, ranks: int, batching: str) -> None:
    size = {"batch_size": 2} if batching == "bucket" else {"batch_size": None, "tokens_per_batch": 36}
    data = cached(latents, held_out=THREE, batching=batching, canonical_ranks=2, **size)
    held, shown = held_keys(data), trained_keys(data, ranks)
    assert len(held) == 3 and not held & shown
    assert held | shown == {key(number) for number in range(len(SHAPES))}


def test_which_they_are_depends_on_keys_alone(latents: str, tmp_path: Path) -> None:
    usual = held_keys(cached(latents, held_out=THREE))
    clips = write_clips(tmp_path / "clips", SHAPES)
    assert held_keys(video(str(clips), held_out=THREE)) == usual
    assert held_keys(cached(latents, held_out=THREE, seed=8, canonical_ranks=4)) == usual
    order = np.random.default_rng(0).permutation(len(SHAPES))
    table = manifest(SHAPES)
    moved = type(table)(**{**vars(table), "key": table.key[order]})
    assert {moved.key[number].decode() for number in chosen(moved, 3)} == usual
    more = {name.decode() for name in table.key[chosen(table, 4)]}
    assert usual < more and len(more) == 4


def test_a_held_out_sample_always_reads_the_same(latents: str) -> None:
    one, other = (cached(latents, held_out=THREE, seed=seed).held() for seed in (1, 2))
    for number in range(len(one)):
        first, second = one.read(number), other.read(number)
        assert first.keys == second.keys and first.captions == second.captions
        assert first.draws.tolist() == second.draws.tolist()
        assert all(a.equal(b) for a, b in zip(first.latents, second.latents, strict=True))


def test_at_most_a_tenth_of_each_data_set_is_held_out(latents: str, monkeypatch, tmp_path: Path) -> None:
    assert len(held_keys(cached(latents, held_out=HeldOut(clips=100)))) == 4
    assert not len(chosen(manifest([(32, 32, 9)] * 9), 5))
    monkeypatch.setattr("data_tiny.key", lambda number: f"{number + 1000:032x}")
    few = str(write_latents(tmp_path / "few", SHAPES[:9]))
    data = cached([latents, few], held_out=HeldOut(clips=100), mix=[0.5, 0.5])
    assert not any(name in held_keys(data) for name in (f"{number + 1000:032x}" for number in range(9)))
    assert len(held_keys(data)) == 4


def test_nothing_held_out_leaves_the_order_as_it_was(latents: str) -> None:
    one, other = cached(latents), cached(latents, held_out=HeldOut())
    assert one.plan().state(0) == other.plan().state(0)


def test_a_run_does_not_go_on_with_other_samples_held_out(latents: str) -> None:
    state = cached(latents, held_out=THREE).plan().state(0)
    with pytest.raises(ConfigError, match="validation.clips"):
        cached(latents, held_out=HeldOut(clips=4)).load_state_dict(state)


def test_they_are_counted_among_what_is_not_shown(latents: str) -> None:
    data = cached(latents, held_out=THREE)
    summary = data.summary()
    assert summary["dropped"] == {REASON: 3} and sum(item["samples"] for item in summary["buckets"]) == 37
    assert sum(data.plan().assignment.rates) == pytest.approx(37)


def test_a_folder_of_latents_takes_their_place(latents: str, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr("data_tiny.key", lambda number: f"{number + 1000:032x}")
    beside = str(write_latents(tmp_path / "beside", SHAPES[:6]))
    data = cached(latents, held_out=HeldOut(clips=4, latents=beside))
    assert len(held_keys(data)) == 4 and all(int(name, 16) >= 1000 for name in held_keys(data))
    assert len(trained_keys(data, 1)) == len(SHAPES)
    with pytest.raises(DataError, match="are trained on too"):
        cached(latents, held_out=HeldOut(clips=4, latents=latents)).held()
    clips = str(write_clips(tmp_path / "clips", SHAPES[:2]))
    with pytest.raises(DataError, match="holds mp4, not latents"):
        cached(latents, held_out=HeldOut(clips=4, latents=clips)).held()


def test_bad_values_are_refused() -> None:
    with pytest.raises(ConfigError, match="validation.clips=-1"):
        HeldOut(clips=-1)
    with pytest.raises(ConfigError, match="validation.clips=0"):
        HeldOut(latents="somewhere")
