"""Prompts made longer by one of two processes that draw together, by the command that people type."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from test_published_chain import UNIT, call


@pytest.mark.full
def test_one_of_two_processes_has_the_prompts_made_and_both_draw_them(tmp_path: Path) -> None:
    sys.path.insert(0, str(UNIT))
    from chat_server import chatting
    from dit_stage_tiny import write_chain

    write_chain(tmp_path / "nets")
    nets = [f"inputs.vae={tmp_path}/nets", f"inputs.dit={tmp_path}/nets", "machine=laptop", "sampler.steps=1"]
    drawn = ["size=32x32", "frames=1", "prompts_file=prompts.txt", "samples=2", "stage.job.batch=1", "out=two"]
    (tmp_path / "prompts.txt").write_text("a cat\n三只猫\n", encoding="utf-8")
    with chatting(lambda body: f"A longer form of {body['messages'][-1]['content'].rpartition(chr(10))[2]}") as host:
        expand = ["expand=openai", f"expand.url={host.url}", "expand.model=tiny"]
        said = call(tmp_path, "stage=sample", *nets, *drawn, *expand, "strategy=ddp", "trainer.devices=2")
    assert len(host.asked) == 2 and said.count("→") == 2
    notes = [json.loads(file.read_text()) for file in (tmp_path / "two" / "samples").glob("*.json")]
    assert sorted((note["prompt"], note["expanded"], note["seed"]) for note in notes) == [
        (prompt, f"A longer form of {prompt}", seed) for prompt in ("a cat", "三只猫") for seed in (0, 1)
    ]
