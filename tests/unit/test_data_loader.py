from __future__ import annotations

import json
import os
import pickle
import signal
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from data_tiny import key, write_clips, write_latents

from soratrain.batch import draw_of
from soratrain.data.buckets import Native, Table
from soratrain.data.captions import CaptionMix, captions_of
from soratrain.data.datamodule import LatentData, VideoData
from soratrain.data.manifest import write_captions
from soratrain.errors import ConfigError, DataError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
SHAPES = [(32, 32, 9)] * 9 + [(32, 48, 9)] * 5 + [(32, 32, 1)] * 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> str:
    return str(write_clips(tmp_path_factory.mktemp("clips"), SHAPES, max_bytes=20_000))


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> str:
    return str(write_latents(tmp_path_factory.mktemp("latents"), SHAPES))


def video(clips: str, **options) -> VideoData:
    return VideoData(**{"shards": clips, "buckets": Native(), "seed": 3, "max_steps": 8, "batch_size": 2} | options)


def cached(latents: str, **options) -> LatentData:
    return LatentData(**{"latents": latents, "seed": 3, "max_steps": 8, "batch_size": 2} | options)


def same(one, other) -> bool:
    fields = vars(one).keys() - {"video", "latents", "text"}
    payloads = [[batch.video] if hasattr(batch, "video") else [*batch.latents, *batch.text] for batch in (one, other)]
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in [
            *((getattr(one, name), getattr(other, name)) for name in fields),
            *zip(*payloads, strict=True),
        ]
    )


class Toy(L.LightningModule):
    """Learns each sample's mean; remembers what it saw in each step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        torch.nn.init.constant_(self.layer.weight, 0.3)
        torch.nn.init.constant_(self.layer.bias, 0.1)
        self.seen: list[tuple[int, str]] = []

    def training_step(self, batch, batch_idx):
        self.seen += [(self.trainer.global_step, name) for name in batch.keys]
        x = torch.stack([latent.mean() / 20 for latent in batch.latents])[:, None]
        target = torch.stack([noise.sum() for noise in batch.normal("noise", [(1,)] * len(batch))])
        return batch.mean((self.layer(x)[:, 0] - target) ** 2)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=0.05)


class StopAt(L.Callback):
    """Stops a run after a number of finished micro-batches, as a user or a crash would."""

    def __init__(self, path: Path, micro: int, how: str) -> None:
        self.path, self.micro, self.how = path, micro, how

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx + 1 == self.micro:
            if self.how == "stop":
                trainer.save_checkpoint(self.path)
                trainer.should_stop = True
            else:
                raise KeyboardInterrupt

    def on_exception(self, trainer, module, exception):
        trainer.save_checkpoint(self.path)


def train(data: LatentData, *, ranks: int = 1, ckpt_path=None, callbacks=(), steps: int = 8) -> Toy:
    data.seat = (0, ranks) if ranks > 1 else None
    toy = Toy()
    trainer = L.Trainer(
        max_steps=steps,
        max_epochs=-1,
        accumulate_grad_batches=data.accumulation(ranks),
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(toy, datamodule=data, ckpt_path=ckpt_path)
    return toy


def weights(toy: Toy) -> list[float]:
    return [float(value) for parameter in toy.parameters() for value in parameter.detach().flatten()]


OPTIONS = dict(accumulate_blocks=2, canonical_ranks=2, gamma=0.5)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_and_gone_on_with_equals_one_that_was_not(latents, tmp_path, workers):
    options = OPTIONS | {"workers": workers}
    whole = train(cached(latents, **options))
    first = train(cached(latents, **options), callbacks=[StopAt(tmp_path / "c", 12, "stop")])
    second = train(cached(latents, **options), ckpt_path=tmp_path / "c")
    assert first.seen + second.seen == whole.seen and 0 < len(second.seen) < len(whole.seen)
    assert weights(second) == weights(whole) != weights(first)


@pytest.mark.parametrize("micro", [1, 4, 11, 18])
def test_a_run_killed_inside_an_accumulation_repeats_that_step_and_no_other(latents, tmp_path, micro):
    whole = train(cached(latents, **OPTIONS))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        train(cached(latents, **OPTIONS), callbacks=[StopAt(tmp_path / "c", micro, "kill")])
    second = train(cached(latents, **OPTIONS), ckpt_path=tmp_path / "c")
    assert second.seen == [item for item in whole.seen if item[0] >= micro // 4]
    assert weights(second) == weights(whole)


def test_a_finished_run_can_be_made_longer(latents, tmp_path):
    class SaveAtEnd(L.Callback):
        def on_train_end(self, trainer, module):
            trainer.save_checkpoint(tmp_path / "c")

    whole = train(cached(latents, **OPTIONS))
    first = train(cached(latents, **OPTIONS | {"max_steps": 5}), steps=5, callbacks=[SaveAtEnd()])
    second = train(cached(latents, **OPTIONS), ckpt_path=tmp_path / "c")
    assert first.seen + second.seen == whole.seen and weights(second) == weights(whole)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_ranks(latents, tmp_path, before, after):
    whole = train(cached(latents, **OPTIONS), ranks=after)
    micros = 5 * cached(latents, **OPTIONS).accumulation(before)
    train(cached(latents, **OPTIONS), ranks=before, callbacks=[StopAt(tmp_path / "c", micros, "stop")])
    second = train(cached(latents, **OPTIONS), ranks=after, ckpt_path=tmp_path / "c")
    assert second.seen == [item for item in whole.seen if item[0] >= 5]


def test_the_first_start_fixes_the_canonical_ranks(latents, tmp_path):
    data = cached(latents, accumulate_blocks=2)
    data.seat = (0, 4)
    state = data.state_dict()
    assert state["canonical_ranks"] == 4
    other = cached(latents, accumulate_blocks=2)
    other.seat = (0, 2)
    other.load_state_dict(state)
    assert other.accumulation(2) == 4
    with pytest.raises(ConfigError, match="3 ranks"):
        other.accumulation(3)


def test_the_state_of_another_dataset_is_refused(latents, clips):
    with pytest.raises(ConfigError, match="another dataset"):
        cached(latents).load_state_dict(video(clips).state_dict())


def test_a_trainer_that_accumulates_otherwise_is_refused(latents):
    data = cached(latents, accumulate_blocks=2)
    trainer = L.Trainer(max_steps=8, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ConfigError, match="data.accumulation"):
        trainer.fit(Toy(), datamodule=data)


@pytest.mark.parametrize("kind", ["video", "latents"])
def test_workers_change_nothing(clips, latents, kind):
    made = [
        video(clips, workers=workers, cache=cache) if kind == "video" else cached(latents, workers=workers, cache=cache)
        for workers, cache in ((0, 0), (0, 10**8), (2, 10**8))
    ]
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
    assert found == [[9, 10], [13, 11], [12, 12], [1, 2], [16, 15], [8, 4], [10, 9], [18, 14], [6, 3], [7, 5]]


def test_after_the_last_step_come_micro_batches_that_no_run_has_trained_on_in_that_order(latents, tmp_path):
    class Look(L.Callback):
        def on_train_end(self, trainer, module):
            self.found = [batch.keys for batch in trainer.datamodule.train_dataloader()]
            self.state = trainer.datamodule.state_dict()

    whole, again = Look(), Look()
    train(cached(latents, **OPTIONS), callbacks=[whole])
    train(cached(latents, **OPTIONS), callbacks=[StopAt(tmp_path / "c", 12, "stop")])
    train(cached(latents, **OPTIONS), callbacks=[again], ckpt_path=tmp_path / "c")
    assert whole.found == again.found == [batch.keys for batch in cached(latents, **OPTIONS).loader(32, 64)]
    assert whole.state["consumed_microbatches"] == again.state["consumed_microbatches"] == 32


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


def test_durations_and_single_frames_are_mixed_as_asked(clips):
    data = video(clips, durations=[1, 5, 9], image_fraction=0.5, batch_size=1)
    frames = Counter(batch.video.shape[1] for batch in data.loader(2, 202))
    assert set(frames) == {1, 5, 9}
    assert abs(frames[1] - 100) <= 3 and abs(frames[5] - frames[9]) <= 3


def test_captions_made_later_replace_those_in_the_shard(clips, tmp_path):
    made = [
        {"key": key(number), "type": "long", "text": f"made {number}", "model": "m", "rev": "r", "lang": "en"}
        for number in range(len(SHAPES))
    ]
    write_captions(tmp_path / "captions" / "r" / "part-00000.parquet", made)
    batches = list(video(clips, captions=str(tmp_path), caption_mix={"synthetic": 1.0}).loader(0, 6))
    for batch in batches:
        assert list(batch.captions) == [f"made {int(name, 16)}" for name in batch.keys]
    batches = list(video(clips, caption_types={"short": 1.0}).loader(0, 6))
    for batch in batches:
        assert list(batch.captions) == [f"short original {int(name, 16)}" for name in batch.keys]
    assert {style for batch in batches for style in batch.styles} == {"short"}


def test_captions_beside_the_shards_are_the_original_ones(tmp_path):
    folder = write_clips(tmp_path, SHAPES)
    rows = [
        {"key": key(number), "type": "gt", "text": f"beside {number}", "model": "", "rev": "", "lang": ""}
        for number in range(0, len(SHAPES), 2)
    ]
    write_captions(folder / "captions" / "gt" / "part-00000.parquet", rows)
    data = video(str(folder), caption_types={"gt": 1.0, "short": 1.0})
    for batch in data.loader(0, 6):
        for name, caption in zip(batch.keys, batch.captions, strict=True):
            assert caption == f"{'short original' if int(name, 16) % 2 else 'beside'} {int(name, 16)}"


@pytest.mark.parametrize(
    "header",
    [{"captions": ["a  dog"]}, {"captions": "a dog"}, {"caption": "a dog"}, {"text": "a dog\n", "caption": None}],
)
def test_plain_strings_of_another_program_are_captions(header):
    assert captions_of(header) == [{"type": "gt", "text": "a dog"}]


def test_captions_come_as_often_as_their_weights():
    original = [{"type": "short", "text": "os"}, {"type": "tags", "text": "ot"}]
    made = {"k": [{"type": "long", "text": "a"}, {"type": "long", "text": "b"}, {"type": "short", "text": "c"}]}
    mix = CaptionMix(sources={"synthetic": 0.8, "original": 0.2}, types={"long": 3, "short": 1}, made=made)
    found = Counter(mix.choose("k", original, draw_of(number))[0] for number in range(8000))
    assert found["ot"] == 0
    assert {text: found[text] / 8000 for text in "abc"} == pytest.approx({"a": 0.3, "b": 0.3, "c": 0.2}, abs=0.02)
    assert mix.choose("other", original, 1) == ("os", "short")
    assert mix.choose("other", [], 1) == ("", "")
    assert mix.choose("k", original, 17) == mix.choose("k", original, 17)


def damage(folder: Path, numbers: list[int]) -> None:
    from soratrain.data.manifest import read_manifest

    for row in read_manifest(folder).rows():
        if int(row.key, 16) in numbers:
            with open(folder / row.shard, "r+b") as file:
                file.seek(row.media_offset + 40)
                file.write(b"\xff" * 20)


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
    from soratrain.data.manifest import read_manifest

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
        (dict(batching="pack"), "data.batching='pack'"),
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
    for text in ("9 samples in 2 buckets", "1 samples of 96x48x9 merged into 32x32x9", "1 samples dropped: smaller"):
        assert text in caplog.text
    assert "for want of samples: 32x32x1, 32x32x9" in caplog.text
