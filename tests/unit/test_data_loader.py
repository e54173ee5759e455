"""Promises of loading: the same batches whatever the workers and ranks, and damage that costs no batch."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import time
from collections import Counter
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from data_tiny import key, write_clips
from loading import SHAPES, cached, damage, same, video
from torch.utils.data import Dataset, TensorDataset

from soratrain import slurm
from soratrain.batch import draw_of
from soratrain.data import loader as loading_again
from soratrain.data.buckets import Table
from soratrain.data.loader import made_by
from soratrain.errors import ConfigError, DataError

PACK = dict(batching="pack", batch_size=None, tokens_per_batch=60)


@pytest.mark.parametrize("kind", ["video", "latents", "packs"])
def test_workers_change_nothing(clips, latents, kind):
    def make(**options):
        return (
            video(clips, **options)
            if kind == "video"
            else cached(latents, **options | (PACK if kind == "packs" else {}))
        )

    made = [make(workers=workers, cache=cache) for workers, cache in ((0, 0), (0, 10**8), (2, 10**8))]
    batches = [list(data.loader(2, 9)) for data in made]
    assert all(len(found) == 7 for found in batches)
    assert all(same(a, b) and same(a, c) for a, b, c in zip(*batches, strict=True))


def test_ctrl_c_is_the_training_process_own_affair(latents):
    loader = cached(latents, workers=1, prefetch=1).loader(0, 8)
    batches = iter(loader)
    found = [next(batches)]
    os.kill(loader._iterator._workers[0].pid, signal.SIGINT)  # as a terminal does to all processes of a command
    found += batches
    assert all(same(a, b) for a, b in zip(found, cached(latents).loader(0, 8), strict=True))


class Dying(Dataset):
    """Items of which each number's first `times` tries end as they do where the worker has died."""

    def __init__(self, times: dict[int, int]) -> None:
        self.times = dict(times)

    def __getitem__(self, number: int) -> int:
        if self.times.get(number, 0):
            self.times[number] -= 1
            raise RuntimeError("DataLoader worker exited unexpectedly")
        return number


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ({2: 3, 500: 3, 1499: 3, 1500: 3}, None),  # of which no thousand micro-batches have more than nine
        (dict.fromkeys(range(0, 2000, 90), 1), None),  # nor these more than twelve
        ({2: 4}, "worker 0 died, 4 times in a row at micro-batch 2. Fewer data.workers"),
        (dict.fromkeys(range(0, 2000, 80), 1), "worker 0 died, 13 times of late, the last at micro-batch 960. Fewer"),
    ],
)
def test_workers_are_started_again_but_not_for_ever(times, said, monkeypatch):
    loader = loading_again.Loader(Dying(times), batch_size=None, sampler=loading_again.Span(0, 2000))
    monkeypatch.setattr(loading_again, "dead", lambda _: "worker 0 died")
    if said is None:
        assert list(loader) == list(range(2000))
    else:
        with pytest.raises(DataError) as refused:
            list(loader)
        assert str(refused.value).startswith(said)


def test_the_signals_that_slurm_sends_to_every_process_are_the_training_process_own_affair(latents, monkeypatch):
    server = forkserver._forkserver
    for name in ("_forkserver_pid", "_forkserver_address", "_forkserver_alive_fd"):
        monkeypatch.setattr(server, name, None)  # another test may have started it, and another way
    loader = cached(latents, workers=2, prefetch=1).loader(0, 8)
    batches = iter(loader)
    found = [next(batches)]
    workers = list(loader._iterator._workers)
    others = [*(worker.pid for worker in workers), server._forkserver_pid]
    for pid in others:
        for number in slurm.SIGNALS:
            subprocess.run(["kill", f"-{number}", str(pid)], check=True)  # from somebody else, as SLURM is
    time.sleep(0.2)
    found += batches
    assert all(same(a, b) for a, b in zip(found, cached(latents).loader(0, 8), strict=True))
    assert loader._iterator._workers == workers and all(Path(f"/proc/{pid}").exists() for pid in others)
    workers[0].terminate()  # from the training process itself
    workers[0].join(10)
    assert workers[0].exitcode == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_an_error_in_a_worker_keeps_its_own_one_line(tmp_path, workers):
    folder = write_clips(tmp_path / "shards", SHAPES)
    damage(folder, list(range(len(SHAPES))))
    with pytest.raises(DataError) as caught:
        list(video(str(folder), workers=workers, max_bad=1.0).loader(0, 2))
    assert str(caught.value).startswith("no sample of bucket") and "\n" not in str(caught.value)


def test_ranks_change_nothing_but_who_computes(clips):
    def micros(ranks: int) -> Counter:
        found: Counter = Counter()
        for rank in range(ranks):
            data = video(clips, canonical_ranks=2, gamma=1.0)
            data.seat = (rank, ranks)
            for batch in data.loader(0, 16 // ranks):
                found.update(zip(batch.keys, batch.captions, batch.draws.tolist(), batch.weights.tolist(), strict=True))
        return found

    assert micros(1) == micros(2)


def test_every_rank_has_the_same_number_of_micro_batches(latents):
    lengths = set()
    for rank in range(2):
        data = cached(latents, canonical_ranks=2)
        data.seat = (rank, 2)
        lengths.add(len(data.train_dataloader()))
    assert lengths == {8}


def test_weights_sum_to_one_over_a_step_and_scale_undoes_the_average(clips):
    data = video(clips, accumulate_blocks=3, canonical_ranks=2, gamma=0.5)
    batches = list(data.loader(0, 6))
    assert sum(float(batch.weights.sum()) for batch in batches) == pytest.approx(1)
    losses = [batch.mean(torch.ones(len(batch))) for batch in batches]
    assert float(sum(losses) / len(losses)) == pytest.approx(1)


def test_draws_are_keyed_on_seed_step_and_sample(clips):
    for step, batch in enumerate(video(clips).loader(0, 3)):
        assert batch.draws.tolist() == [draw_of(3, step, name) for name in batch.keys]


def test_the_first_epoch_has_this_order(latents):
    found = [[int(name, 16) for name in batch.keys] for batch in cached(latents).loader(0, 10)]
    assert found == [[11, 10], [12, 9], [13, 10], [3, 7], [15, 14], [8, 5], [13, 9], [17, 19], [0, 6], [4, 1]]


def test_batches_are_typed_and_of_their_bucket(clips, latents):
    for batch in video(clips).loader(0, 12):
        shape = SHAPES[int(batch.keys[0], 16)]
        assert batch.video.shape == (2, shape[2], shape[0], shape[1], 3) and batch.video.dtype == torch.uint8
        assert batch.fps.tolist() == [8.0, 8.0]
    for batch in cached(latents).loader(0, 12):
        for name, latent in zip(batch.keys, batch.latents, strict=True):
            height, width, frames = SHAPES[int(name, 16)]
            assert latent.shape == (4, (frames + 3) // 4, height // 8, width // 8) and latent.dtype == torch.float32
            assert (latent == int(name, 16)).all()


def test_a_pack_holds_latents_of_any_size_each_as_it_is_and_weighs_a_step(latents):
    batches = list(cached(latents, **PACK, gamma=0.5, accumulate_blocks=2).loader(0, 8))
    for batch in batches:
        for name, latent in zip(batch.keys, batch.latents, strict=True):
            height, width, frames = SHAPES[int(name, 16)]
            assert latent.shape == (4, 1 + (frames - 1) // 4, height // 8, width // 8)
            assert (latent == float(int(name, 16))).all()
        assert sum(latent[0].numel() // 4 for latent in batch.latents) <= 60
    assert any(len({latent.shape for latent in batch.latents}) == 3 for batch in batches)
    assert [float(a.weights.sum() + b.weights.sum()) for a, b in zip(batches[::2], batches[1::2], strict=True)] == (
        pytest.approx([1] * 4)
    )


def test_pixels_cannot_be_packed(clips):
    with pytest.raises(ConfigError, match="data.batching=pack: clips are stacked"):
        video(clips, **PACK).items()


def test_durations_and_single_frames_are_mixed_as_asked(clips):
    data = video(clips, durations=[1, 5, 9], image_fraction=0.5, batch_size=1)
    frames = Counter(batch.video.shape[1] for batch in data.loader(2, 202))
    assert set(frames) == {1, 5, 9}
    assert abs(frames[1] - 100) <= 3 and abs(frames[5] - frames[9]) <= 3


def test_at_a_fraction_of_its_rate_a_clip_says_so_and_its_frames_lie_as_far_apart(clips):
    options = dict(durations=[1, 5, 9], strides=[1, 2, 3], batch_size=1)
    found = {cache: list(video(clips, cache=cache, **options).loader(2, 62)) for cache in (0, 10**8)}
    rates: dict[int, set] = {1: set(), 5: set(), 9: set()}
    for batch, again in zip(*found.values(), strict=True):
        assert same(batch, again)
        fps, levels = float(batch.fps), batch.video[0].flatten(1).float().mean(1)
        rates[batch.video.shape[1]].add(fps)
        steps = levels.diff()[levels.diff() > 0]  # grey levels rise by 11 a frame, and now and then fall by 200
        assert len(steps) == 0 or (steps - 11 * 8 / fps).abs().max() <= 3
    assert rates == {1: {8.0}, 5: {8.0, 4.0}, 9: {8.0}}  # five frames at a third of the rate would need thirteen
    with pytest.raises(ConfigError, match=r"data.strides=\[2\]: must hold 1"):
        video(clips, strides=[2])


def test_a_damaged_sample_is_replaced_by_another_of_its_bucket_and_reported(tmp_path):
    folder = write_clips(tmp_path / "shards", SHAPES)
    intact = list(video(str(folder)).loader(0, 14))
    damage(folder, [2, 10])
    runs = [
        list(video(str(folder), quarantine=str(tmp_path / name), cache=cache, max_bad=0.2).loader(0, 14))
        for name, cache in (("a", 0), ("b", 10**8))
    ]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    replaced = 0
    for whole, mended in zip(intact, runs[0], strict=True):
        assert whole.video.shape == mended.video.shape
        for before, after in zip(whole.keys, mended.keys, strict=True):
            assert after not in (key(2), key(10))
            if before in (key(2), key(10)):
                replaced += 1
                assert SHAPES[int(after, 16)] == SHAPES[int(before, 16)]
            else:
                assert after == before
    lines = [json.loads(line) for line in (tmp_path / "a").read_text().splitlines()]
    assert replaced >= 2 and sorted(line["key"] for line in lines) == [key(2), key(10)]
    assert all("CRC-32" in line["reason"] for line in lines)


@pytest.mark.parametrize("header", [b"[]", b"{", b'{"captions": 3}', b'{"captions": [{"text": 1}]}', b"\xff"])
def test_a_damaged_header_is_put_aside_too(tmp_path, header):
    from soratrain.data.reading import read_manifest

    folder = write_clips(tmp_path / "shards", SHAPES)
    row = read_manifest(folder).row(2)
    with open(folder / row.shard, "r+b") as file:
        file.seek(row.json_offset)
        file.write(header.ljust(row.json_length))
    batches = list(video(str(folder), quarantine=str(tmp_path / "q")).loader(0, 14))
    assert all(row.key not in batch.keys for batch in batches)
    assert "K.json" in json.loads((tmp_path / "q").read_text())["reason"]


def test_a_run_stops_where_too_much_is_damaged(tmp_path):
    folder = write_clips(tmp_path / "shards", SHAPES)
    damage(folder, [0, 1, 2, 3, 4, 9, 14])
    with pytest.raises(DataError, match="data.max_bad"):
        list(video(str(folder)).loader(0, 30))
    damage(folder, list(range(9)))
    with pytest.raises(DataError, match="no sample of bucket 32x32x9 can be read"):
        list(video(str(folder), max_bad=1.0).loader(0, 30))


def test_a_dataset_can_be_pickled_for_a_worker(clips):
    items = video(clips, cache=10**7).items()
    before = items[3]
    assert same(pickle.loads(pickle.dumps(items))[3], before)


def test_the_summary_accounts_for_every_sample(tmp_path):
    shapes = [(32, 32, 10)] * 6 + [(40, 40, 9)] * 2 + [(16, 12, 9)] + [(48, 96, 9)]
    folder = write_clips(tmp_path, shapes)
    found = video(str(folder), batch_size=8).summary()
    assert found["samples"] == 10 and found["dropped"] == {"smaller than 16 pixels": 1}
    assert [(entry["bucket"], entry["samples"], entry["batch_size"]) for entry in found["buckets"]] == [
        ("32x32x9", 9, 8),
    ]
    assert found["merged"] == [{"from": "96x48x9", "to": "32x32x9", "samples": 1}]
    assert found["frames_discarded"] == pytest.approx(6 / (60 + 27))
    assert sum(entry["blocks"] for entry in found["buckets"]) == pytest.approx(1)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(batching="packs"), "data.batching=.packs. is not there"),
        (dict(tokens_per_batch=100), "set one of them"),
        (dict(workers=-1), "data.workers=-1"),
        (dict(prefetch=0), "data.prefetch=0"),
        (dict(durations=[4]), "data.durations"),
        (dict(caption_mix={"made": 1.0}), "data.caption_mix.made"),
        (dict(caption_types={"long": -1.0}), "data.caption_types.long"),
        (dict(buckets=Table(table=["32x32x9"]), canonical_ranks=50), "fewer than the 50 ranks"),
    ],
)
def test_options_that_cannot_work_are_refused(clips, options, message):
    with pytest.raises(ConfigError, match=message):
        video(clips, **options).items()


def test_latents_are_not_taken_for_clips_nor_clips_for_latents(clips, latents):
    with pytest.raises(DataError, match="holds latents, not clips"):
        video(latents).items()
    with pytest.raises(DataError, match="not latents; run stage=encode"):
        cached(clips).items()


def test_what_was_merged_dropped_or_made_smaller_is_said_before_training(tmp_path, caplog):
    folder = write_clips(tmp_path, [(32, 32, 9)] * 6 + [(16, 12, 9)] + [(48, 96, 9)] + [(32, 32, 1)])
    with caplog.at_level("INFO"):
        video(str(folder), batch_size=8).items()
    for text in ("9 samples in 2 buckets", "1 sample of 96x48x9 merged into 32x32x9", "1 sample dropped: smaller"):
        assert text in caplog.text
    assert "for want of samples: 32x32x1, 32x32x9" in caplog.text


class Fatal(Dataset):
    """Its third item ends the process that makes it, or is an error of its own."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error

    def __len__(self) -> int:
        return 4

    def __getitem__(self, number: int) -> int:
        if number < 2:
            return number
        if self.error is not None:
            raise self.error
        os.kill(os.getpid(), signal.SIGKILL)
        return number


def test_a_process_of_a_job_that_dies_is_one_line_and_an_error_in_one_stays_what_it_is() -> None:
    seen = []
    with pytest.raises(DataError, match=r"loader process 0 of 1 .*SIGKILL.* Fewer stage.job.workers .* goes on"):
        for item in made_by(Fatal(), 1):
            seen.append(item)
    assert seen[:1] == [0]
    for workers in (0, 1):
        with pytest.raises(ValueError, match="mine"):
            list(made_by(Fatal(ValueError("mine")), workers))
    assert [int(item) for (item,) in made_by(TensorDataset(torch.arange(3)), 0)] == [0, 1, 2]
