"""Promises of stage=plan: what it says beforehand is what comes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from data_tiny import write_clips
from planned_tiny import DDP, WORDS, planned, write_shards
from safetensors.torch import save_file

from soratrain.amounts import memory
from soratrain.distributed.options import StrategyOptions
from soratrain.errors import ConfigError
from soratrain.run import check_machine, instantiate, prepare, run
from soratrain.stages.plan_cost import parse_clip
from soratrain.stages.plan_device import on_gpu
from soratrain.stages.plan_ranks import Ranks, ranks_of
from soratrain.stages.plan_table import mends


def test_every_sample_is_in_a_bucket_or_counted_with_its_reason(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    data = planned(tmp_path)["data"]
    assert {item["bucket"]: item["samples"] for item in data["buckets"]} == {"64x48x9": 12, "48x64x1": 6}
    assert data["dropped"] == {"smaller than 16 pixels": 2} and data["samples"] == 20
    said = capsys.readouterr().out
    assert "64x48x9" in said and "2 samples dropped: smaller than 16 pixels" in said and "an estimate" in said


def test_steps_epochs_and_tokens_add_up(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    figures = planned(tmp_path, "machine.steps.dit=100", *DDP, "stage.job.ranks=2")["run"]
    assert figures["epochs"] == pytest.approx(figures["samples_per_step"] * 100 / 18)
    assert figures["tokens"] == pytest.approx(100 * figures["tokens_per_step"])
    assert planned(tmp_path, *DDP, "stage.job.ranks=3", "fresh=true")["balance"]["least"] == 1.0


def test_what_the_command_or_an_experiment_sets_is_planned(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    words = ("target=dit", "trainer.max_steps=7", "data.tokens_per_batch=40")
    small, usual = planned(tmp_path, *words)["run"], planned(tmp_path, "target=dit")["run"]
    assert small["steps"] == 7 and small["tokens_per_step"] < usual["tokens_per_step"]
    fixed = planned(tmp_path, "target=dit", "data.batch_size=2")["run"]
    assert fixed["samples_per_step"] == 2
    finer = planned(tmp_path, "target=dit", "+experiment=native_res")["run"]
    assert finer["steps"] == 600 and finer["samples_per_step"] != usual["samples_per_step"]


def test_it_needs_no_gpu_and_plans_for_one(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    config, _ = prepare(["stage=plan", "machine=gpu"])
    check_machine(config)
    memory = planned(tmp_path, "machine=gpu", "stage.job.ranks=2", "strategy=zero3")["memory"]
    assert memory["parameters"] > 1e9 and memory["gib"]["weights"] == pytest.approx(memory["parameters"] * 2 / 2**30)
    assert memory["device_gib"] == 79.1 and memory["on_host"] == []
    for target, known in (("vae", True), ("captioner", False)):
        capsys.readouterr()
        found = planned(tmp_path, f"stage.job.target={target}", "fresh=true")
        assert ("activations" in found["memory"]["gib"]) is known
        # a captioner sees pixels
        assert [found["cache"] is not None, found["clip"] is not None] == [known, known]
        said = capsys.readouterr().out
        assert [part in said for part in ("cached latents", "of latents", "a clip of")] == [known] * 3


def test_ranks_that_share_their_tokens_have_one_micro_batch_and_a_part_of_its_activations(
    tmp_path: Path, capsys
) -> None:
    write_shards(tmp_path / "shards")
    words = ("target=dit", "strategy=zero3", "optimizer=adamw", "dit.num_heads=4", "trainer.max_steps=10")
    pairs = planned(tmp_path, "stage.job.ranks=4", "parallel.sequence=2", *words)
    said = capsys.readouterr().out
    apart, two = (planned(tmp_path, f"stage.job.ranks={ranks}", *words) for ranks in (4, 2))
    assert "on 4 ranks (2 x 2 that share their tokens)" in said
    assert pairs["run"] == two["run"] and pairs["data"] == two["data"] and pairs["run"] != apart["run"]
    parts = [found["memory"]["gib"] for found in (pairs, apart, two)]
    assert parts[0]["weights"] == parts[1]["weights"] < parts[2]["weights"]  # ZeRO shards over all ranks
    assert 0.5 < parts[0]["activations"] / parts[2]["activations"] < 0.6
    with pytest.raises(ConfigError, match=r"parallel.sequence=2: 3 ranks \(stage.job.ranks=3\) make no whole groups"):
        planned(tmp_path, "stage.job.ranks=3", "parallel.sequence=2", *words)


def test_what_offload_moves_to_the_host_and_how_long_a_step_takes_is_told(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    words = ["machine=gpu", "stage.job.ranks=16", "strategy=zero3_offload", "strategy.weights=bf16"]
    found = planned(tmp_path, *words)
    memory, time = found["memory"], found["time"]
    assert set(memory["on_host"]) == {"weights", "gradients", "optimizer", "average", "master", "staging"}
    assert memory["host_gib"] == pytest.approx(sum(memory["gib"][name] for name in memory["on_host"]))
    assert memory["gib"]["weights"] == pytest.approx(memory["parameters"] * 2 / 16 / 2**30, rel=1e-3)
    assert time["device"] == "h100" and time["nodes"] == 2 and 0 < time["utilisation"] < 0.65
    assert time["step_seconds"] == pytest.approx(sum(time["seconds"].values()))
    assert {row["from"].split(":")[0].split(",")[0].split(" of")[0] for row in time["rests_on"]} == {
        *("data sheet", "cited", "counted", "assumed")
    }
    said = capsys.readouterr().out
    assert "the GPU" in said and "the host" in said and "a step on 16 h100 on 2 nodes, an estimate from below" in said


def test_a_device_of_ones_own_begins_as_another_and_is_planned_for(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    own = "+stage.devices.b200={like:h100,bf16_tflops:2250,memory_gib:179,memory_gb_s:8000}"
    words = ["machine=gpu", "stage.job.ranks=16", "strategy=zero3", "stage.devices.h100.inter_gb_s=50"]
    found = planned(tmp_path, *words, "stage.device=b200", own)
    assert found["memory"]["device_gib"] == 179 and found["time"]["device"] == "b200"
    assert found["time"]["step_seconds"] < planned(tmp_path, *words, "fresh=true")["time"]["step_seconds"]
    rests_on = {row["figure"]: (row["value"], row["from"]) for row in found["time"]["rests_on"]}
    assert rests_on["peak in bf16, TFLOP/s"] == ("2250", "as given")
    assert rests_on["from a node to another, GB/s"] == ("50", "as h100: as given")
    assert rests_on["of it, what attention reaches"][1].startswith("as h100: cited: FlashAttention-2")
    said = " ".join(capsys.readouterr().out.split())
    assert "a step on 16 b200 on 2 nodes" in said and "what that rests on" in said and "as h100: assumed" in said
    with pytest.raises(ConfigError, match=r"stage.devices.b200: no such key; .*begins with a plus: '\+stage.devices"):
        prepare([*WORDS, "stage.devices.b200={like:h100}"])


def test_an_end_that_is_given_is_one_latent_frame_more(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    words = ("target=dit", "data.batch_size=2", "conditioning.tail_frames=[1]", "trainer.precision=32-true")
    words += ("stage.devices.cpu.fp32_tflops=1",)
    without = planned(tmp_path, *words)
    found = planned(tmp_path, *words, "conditioning.mix.suffix=0.25", "conditioning.mix.connect=0.25")
    assert found["run"] == without["run"]
    activations = [item["memory"]["gib"]["activations"] for item in (found, without)]
    assert activations[0] / activations[1] == pytest.approx(4 / 3, rel=1e-4)  # clips of 9 frames have 3 latent ones
    longer = [item["time"]["utilisation"] * item["time"]["step_seconds"] for item in (found, without)]
    assert longer[0] > longer[1]


def test_a_run_that_does_not_fit_is_told_so(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    planned(tmp_path, "machine=gpu", "dit=14b")
    keys = "more ranks (trainer.devices, trainer.num_nodes or stage.job.ranks)"
    few = "dit.recompute=full, or fewer tokens (data.tokens_per_batch)"
    said = capsys.readouterr().out
    assert f"more than the 79.1 GiB of a device: use strategy=zero3 on {keys}, {few}" in said
    assert "plan of stage=dit on 1 rank\n" in said and "strategy=single is one rank; for more: strategy=zero2" in said
    told = {"strategy": "zero2", "recompute": "full"}, {"strategy": "zero3_offload", "recompute": None}
    assert mends(told[0]) == f"use {keys}, strategy=zero3, or fewer tokens (data.tokens_per_batch)"
    assert mends(told[1]) == f"use {keys}, or fewer tokens (data.tokens_per_batch)"


def test_a_training_command_with_its_stage_swapped_is_planned_on_the_trainers_ranks(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    words = ("machine=gpu", "dit=tiny", "strategy=zero2", "trainer.num_nodes=4", "trainer.devices=2")
    found = planned(tmp_path, *words)
    assert found["ranks"] == 8 and found["time"]["nodes"] == 4  # though two nodes of the device would hold them
    said = capsys.readouterr().out
    assert "; largest micro-batch 1 sample, 36 tokens" in said
    assert "plan of stage=dit on 8 ranks\n" in said and "a step on 8 h100 on 4 nodes" in said and "auto" not in said
    assert "the mean rank's work by the largest's (1: none waits for another): 1.000 over 64 steps" in said
    found = planned(tmp_path, *words, "stage.job.ranks=16", "data.canonical_ranks=32")
    assert (found["ranks"], found["time"]["nodes"], found["balance"]["micro_steps"]) == (16, 2, 128)


def test_ranks_that_nobody_says_are_the_gpus_that_are_here_or_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def ranks(devices: int | str = "auto", name: str = "zero2", nodes: int = 1, **more: Any) -> Ranks:
        given = {"ranks": None, "nodes": None, "sequence": 1, "on_gpu": True, **more}
        return ranks_of(trainer_nodes=nodes, trainer_devices=devices, strategy=StrategyOptions(name=name), **given)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    one = ranks()
    assert (one.count, one.nodes) == (1, None) and one.note == (
        "trainer.devices=auto counts as 1 rank of each node, since no GPU is here; for more: trainer.devices,"
        " trainer.num_nodes or stage.job.ranks"
    )
    two = ranks(nodes=2, sequence=4)
    assert (two.count, two.nodes) == (8, 2) and "counts as 4 ranks of each node" in two.note
    assert ranks(on_gpu=False).note == ranks(8).note == ranks(ranks=8).note == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert (ranks().count, ranks(nodes=2).count, ranks(name="single").count) == (4, 8, 1)
    with pytest.raises(ConfigError, match=r"trainer.devices=2 with strategy=single, which is one process; use"):
        ranks(2, "single")
    with pytest.raises(ConfigError, match="trainer.devices=all: use auto or a number"):
        ranks("all")


def test_what_has_no_time_foretold_says_so(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    words = ("target=vae", "+experiment=vae_a", "data.durations=null", "data.image_fraction=null")
    found = planned(tmp_path, *words, "machine.tuned.vae_a.crop=16")
    assert found["time"] is None
    assert "the time of a step is foretold for stage=dit alone, not for a VAE" in capsys.readouterr().out
    larger = planned(tmp_path, *words, "fresh=true")  # crops of 32
    assert larger["memory"]["gib"]["activations"] > 2 * found["memory"]["gib"]["activations"]


def test_latents_made_live_are_planned_with_the_durations_that_training_shows(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    buckets = [
        {item["bucket"] for item in planned(tmp_path, "target=dit", "data.durations=[1,5]", *live)["data"]["buckets"]}
        for live in ((), ("latents=live",))  # with upstream=fail, and neither VAE nor captions there
    ]
    assert buckets == [{"64x48x9", "48x64x1"}, {"64x48x1", "64x48x5", "48x64x1"}]


def test_what_begins_like_the_cpu_is_no_gpu(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    mine = "+stage.devices.mine={like:cpu,fp32_tflops:1,bf16_tflops:1}"
    words = ("stage.device=mine", mine, "+stage.devices.ours={like:mine}")
    found = planned(tmp_path, *words)
    assert found["time"]["on_gpu"] is False and found["memory"]["device_gib"] is None
    said = capsys.readouterr().out
    assert "a step on 1 mine" in said and "published runs" not in said and "the GPU" not in said
    devices = {"cpu": {}, "h100": {}, "mine": {"like": "cpu"}, "ours": {"like": "mine"}, "b200": {"like": "h100"}}
    assert [on_gpu(devices, name) for name in devices] == [False, True, False, False, True]


def test_what_runs_live_beside_the_dit_is_counted_or_said_not_to_be(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    words = ("latents=live", "text=t5", "text.features=live", f"text.folder={tmp_path / 'encoder'}")
    memory = planned(tmp_path, *words)["memory"]
    with torch.device("meta"):
        size = sum(param.numel() for param in instantiate(prepare(WORDS)[0]["vae"])().parameters())
    assert memory["gib"]["the VAE's weights"] == pytest.approx(4 * size / 2**30)
    assert "the text encoder runs live, and" in capsys.readouterr().out
    (tmp_path / "encoder").mkdir()
    save_file({"a": torch.zeros(1000, 3)}, str(tmp_path / "encoder" / "model.safetensors"))
    memory = planned(tmp_path, *words, "fresh=true")["memory"]
    assert memory["gib"]["the text encoder's weights"] == pytest.approx(2 * 3000 / 2**30)


def test_a_plan_for_another_machine_binds_no_later_one(tmp_path: Path) -> None:
    write_shards(tmp_path / "shards")
    planned(tmp_path, "machine=gpu", "stage.job.clip=null")
    config, _ = prepare(["stage=plan", f"out={tmp_path / 'plan'}"])
    fresh, _ = prepare(["stage=plan", f"out={tmp_path / 'another'}"])
    assert config["machine"] == fresh["machine"] and "begun" not in config["machine"]["chosen"]


def test_of_several_data_sets_each_ones_share_and_epochs_are_told(tmp_path: Path, capsys, monkeypatch) -> None:
    write_shards(tmp_path / "shards")
    monkeypatch.setattr("data_tiny.key", lambda number: f"{number + 1000:032x}")
    write_clips(tmp_path / "few", [(48, 64, 9)] * 4)
    (tmp_path / "few" / "dataset.json").write_text("{}")
    both = [f"inputs.shards=[{tmp_path}/shards,{tmp_path}/few]", "data.mix=[0.9,0.1]", "trainer.max_steps=50"]
    found = planned(tmp_path, *both)
    large, few = found["data"]["sets"]
    assert (large["samples"], few["samples"]) == (18, 4) and few["shown"] == pytest.approx(0.1)
    samples = 50 * found["run"]["samples_per_step"]
    assert (large["epochs"], few["epochs"]) == pytest.approx((0.9 * samples / 18, 0.1 * samples / 4))
    lines = capsys.readouterr().out.splitlines()
    said = [line for line in lines if "of the samples shown" in line]
    assert (
        [("more than 20 times" in line) for line in said] == [large["epochs"] > 20, few["epochs"] > 20] == [True, False]
    )
    assert any("data set" in line for line in lines)
    assert planned(tmp_path)["data"]["sets"] == [] and "data set" not in capsys.readouterr().out


def test_amounts_are_told_in_units_of_their_size(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    planned(tmp_path)
    said = capsys.readouterr().out
    assert "cached latents of 18 clips: 64.5 kB" in said and "MiB (weights 16.5 MiB" in said
    told = [memory(count) for count in (5, 2000, 999.4 * 2**20, 1000 * 2**20, 2**34, 2**41)]
    assert told == ["5 B", "1.95 KiB", "999 MiB", "0.977 GiB", "16 GiB", "2,048 GiB"]


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("stage.job.target=dti", "stage.job.target=dti is not there; use one of vae, captioner, dit"),
        ("stage.job.ranks=0", "stage.job.ranks=0 must be at least 1"),
        ("stage.job.ranks=64", "stage.job.ranks=64 with strategy=single, which is one process; use strategy=ddp"),
        (
            "stage.job.nodes=2",
            "stage.job.nodes=2: must lie between 1 and 1 rank .trainer.num_nodes=1 trainer.devices=auto",
        ),
        ("stage.device=h101", "stage.device=h101 is not there; use one of h100, h200, a100, cpu, or add"),
        ("stage.devices.cpu.memory_gb_s=0", "stage.devices.cpu.memory_gb_s=0: must be positive"),
        ("+stage.devices.mine={like:h100,matmull:1}", "stage.devices.mine.matmull=1: no such figure; did you mean 'ma"),
        ("stage.job.clip=1920x1080", "is not WIDTHxHEIGHTxFRAMES"),
    ],
)
def test_a_wrong_value_is_one_line(tmp_path: Path, word: str, said: str) -> None:
    config, overrides = prepare([*WORDS, f"out={tmp_path / 'plan'}", word])
    with pytest.raises(ConfigError, match=said):
        run(config, overrides)
    assert not (tmp_path / "plan").exists()
    assert parse_clip("1920x1080x1440") == (1080, 1920, 1440)


def test_what_stage_dit_holds_out_is_counted_as_there(tmp_path: Path, capsys) -> None:
    write_shards(tmp_path / "shards")
    planned(tmp_path)
    before = json.loads((tmp_path / "plan" / "plan.json").read_text())
    held = planned(tmp_path, "validation.clips=2", "target=dit")
    assert sum(item["samples"] for item in held["data"]["buckets"]) == 16
    assert "2 samples dropped: held out of training, for validation" in capsys.readouterr().out
    run = held["run"]
    assert run["epochs"] == pytest.approx(run["samples_per_step"] * run["steps"] / 16)
    assert held["cache"]["clips"] == before["cache"]["clips"] == 18
    vae = planned(tmp_path, "validation.clips=2", "target=vae")
    assert sum(item["samples"] for item in vae["data"]["buckets"]) == 18
