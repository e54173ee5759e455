"""Promises of going on: a run that stopped anywhere ends as one that did not."""

from __future__ import annotations

import lightning as L
import pytest
from loading import StopAt, Toy, cached, train, video, weights

from soratrain.errors import ConfigError

pytestmark = [
    pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before the epoch ended"),
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
]
OPTIONS = dict(accumulate_blocks=2, canonical_ranks=2, gamma=0.5)
PACKS = OPTIONS | dict(batching="pack", batch_size=None, tokens_per_batch=48)


@pytest.fixture(params=[OPTIONS, PACKS], ids=["bucket", "pack"])
def options(request) -> dict:
    return request.param


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_stopped_and_gone_on_with_equals_one_that_was_not(latents, tmp_path, options, workers):
    options = options | {"workers": workers}
    whole = train(cached(latents, **options))
    first = train(cached(latents, **options), callbacks=[StopAt(tmp_path / "c", 12, "stop")])
    second = train(cached(latents, **options), ckpt_path=tmp_path / "c")
    assert first.seen + second.seen == whole.seen and 0 < len(second.seen) < len(whole.seen)
    assert weights(second) == weights(whole) != weights(first)


@pytest.mark.parametrize("micro", [1, 4, 11, 18])
def test_a_run_killed_inside_an_accumulation_repeats_that_step_and_no_other(latents, tmp_path, options, micro):
    whole = train(cached(latents, **options))
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        train(cached(latents, **options), callbacks=[StopAt(tmp_path / "c", micro, "kill")])
    second = train(cached(latents, **options), ckpt_path=tmp_path / "c")
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
def test_a_run_goes_on_with_another_number_of_ranks(latents, tmp_path, options, before, after):
    whole = train(cached(latents, **options), ranks=after)
    micros = 5 * cached(latents, **options).accumulation(before)
    train(cached(latents, **options), ranks=before, callbacks=[StopAt(tmp_path / "c", micros, "stop")])
    second = train(cached(latents, **options), ranks=after, ckpt_path=tmp_path / "c")
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
