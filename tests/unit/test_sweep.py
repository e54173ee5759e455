"""Promises of a sweep before its first job starts."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir

from soratrain.__main__ import dispatch
from soratrain.errors import ConfigError, UserError
from soratrain.run import prepare
from soratrain.schema import CONF
from soratrain.sweep import combinations, folder_hash, slurm_words

GPU = ["stage=dit", "machine=gpu"]


def words_for(*overrides: str) -> list[str]:
    return slurm_words([prepare(run)[0] for run in combinations([*GPU, *overrides])])


def test_a_job_array_takes_its_size_from_the_trainer() -> None:
    overrides = [*GPU, "strategy=zero3", "trainer.num_nodes=2", "trainer.devices=8", "hydra/launcher=slurm"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose("config", overrides, return_hydra_config=True).hydra.launcher
        assert launcher._target_.endswith("SlurmLauncher")
        assert (launcher.nodes, launcher.tasks_per_node, launcher.gpus_per_node) == (2, 8, 8)
        assert launcher.submitit_folder.startswith("outputs/default/dit/sweep/")


def test_a_job_array_of_single_processes_needs_no_number_of_devices() -> None:
    assert words_for("optimizer.lr=1e-4,3e-4") == ["trainer.devices=1"]
    assert words_for("strategy=zero2", "trainer.devices=4", "seed=1,2") == []


def test_a_job_array_whose_size_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="a login node cannot see how many GPUs.*trainer.devices=NUMBER"):
        words_for("strategy=zero2")


def test_a_job_array_of_jobs_of_several_sizes_is_refused() -> None:
    with pytest.raises(ConfigError, match="jobs of one SLURM array are of one size"):
        words_for("strategy=ddp", "trainer.devices=2", "trainer.num_nodes=1,2")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=dit", "hydra/launcher=slurm"], "put -m before"),
        (["-m", "stage=dit", "hydra/launcher=slrum"], "hydra/launcher=slrum: no such option; did you mean 'slurm'"),
    ],
)
def test_a_launcher_in_the_wrong_place_or_unknown_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        dispatch(words)


def test_a_jobs_folder_does_not_depend_on_the_order_of_its_overrides() -> None:
    assert folder_hash(["a=1", "b=2", "fresh=true"]) == folder_hash(["b=2", "a=1"]) != folder_hash(["a=1", "b=3"])
