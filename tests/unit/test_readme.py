"""The README's commands are commands."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from data_prep import compose as prep_compose
from data_prep.schema import PATHS
from soratrain.compose import LIST_KEYS, TEXT_KEYS
from soratrain.quoting import quote
from soratrain.run import prepare
from soratrain.sweep import combinations

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
SHOWN = README + (ROOT / "docs/slurm.md").read_text()
COMMANDS = sorted(set(re.findall(r"python -m ((?:soratrain|data_prep) [^`\n]*?=[^`\n]*?)(?:`|\s+#|\s*\n)", SHOWN)))


def test_the_readme_shows_every_stage():
    shown = " ".join(COMMANDS)
    assert len(COMMANDS) > 15
    for stage in ("vae", "captioner", "recaption", "encode", "dit", "sample", "evaluate", "plan", "sweep_report"):
        assert f"stage={stage}" in shown


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_composes(command):
    module, *words = shlex.split(command)
    if module == "data_prep":
        assert prep_compose.compose(quote(words, PATHS)).output
        return
    words = [word for word in words if word != "--cfg"]
    runs = (
        combinations(quote(words[1:], TEXT_KEYS, LIST_KEYS))[0]
        if words[0] == "-m"
        else [quote(words, TEXT_KEYS, LIST_KEYS)]
    )
    for run in runs:
        machine = "gpu" if any(word.startswith("strategy=zero") for word in run) else "laptop"  # whose Muon it is not
        config, _ = prepare(run if any(word.startswith("machine=") for word in run) else [f"machine={machine}", *run])
        assert config["stage"]["name"] in command


def test_the_make_targets_that_the_readme_names_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"(?:`|^    )make ([a-z-]+)", SHOWN, re.M)) <= targets
