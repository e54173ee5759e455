"""Promises of a sweep before its first job starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from soratrain.__main__ import dispatch
from soratrain.errors import ConfigError, DataError, UserError
from soratrain.run import prepare
from soratrain.schema import CONF
from soratrain.sweep import combinations, folder_hash, slurm_words

GPU = ["stage=dit", "machine=gpu"]
SLURM = ["stage=dit", "hydra/launcher=slurm"]


def words_for(*overrides: str) -> list[str]:
    return slurm_words([prepare(run)[0] for run in combinations([*GPU, *overrides])[0]])


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
    assert words_for("trainer.accelerator=cpu") == ["hydra.launcher.gpus_per_node=null", "trainer.devices=1"]


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
        (["-m", *SLURM, "hydra.launcher.partion=gpu"], "hydra.launcher.partion: no such key; did you mean 'partition'"),
        (["-m", *SLURM, "+hydra.launcher.mail=me"], "hydra.launcher.mail='me': no such key.*additional_parameters"),
        (["-m", *SLURM, "hydra.launcher.timeout_min=0"], "timeout_min=0: must be a whole number of at least 1$"),
        (
            ["-m", *SLURM, "hydra.launcher.timeout_min=8"],
            "timeout_min=8 with .*signal_delay_s=300: a job would be told",
        ),
        (["-m", *SLURM, "hydra.launcher.setup=module"], "setup='module': must be a list of texts, such as"),
        (["-m", *SLURM, "hydra.launcher.timeout_min=null"], "timeout_min=null: must be a whole number of at least 1$"),
        (["-m", *SLURM, "hydra.launcher.signal_delay_s=null"], "signal_delay_s=null: must be a whole number of at lea"),
        (["-m", *SLURM, "hydra.launcher.signal_delay_s=abc"], "signal_delay_s='abc': must be a whole number of at lea"),
        (["-m", *SLURM, "hydra.launcher.mem_gb=abc"], "mem_gb='abc': must be a whole number of at least 1, or null"),
        (
            ["-m", *SLURM, "hydra.launcher.additional_parameters=abc"],
            "additional_parameters='abc': must be names and v",
        ),
        (["-m", *SLURM, "hydra.launcher.additional_parameters=null"], "additional_parameters=null: must be names and "),
        (["-m", *SLURM, "hydra.launcher.wait=null"], "wait=null: must be true or false"),
        (["-m", *SLURM, "hydra.launcher.srun_args=null"], "srun_args=null: must be a list of texts"),
        (["-m", *SLURM, "hydra.launcher.partition=[a,b]"], "partition=.'a', 'b'.: must be a word, or null"),
        (["-m", *SLURM, "strategy=zero2", "trainer.devices=auto"], "a login node cannot see how many GPUs.*=NUMBER"),
        (
            ["-m", *SLURM, "trainer.num_nodes=2"],
            "trainer.num_nodes=2 trainer.devices=auto with strategy=single: use str",
        ),
        (["-m", *SLURM, "requeues=1,2"], "requeues: is one number for all jobs of a SLURM array"),
        (["-m", *SLURM], "there is no sbatch on this machine; run it on a login node"),
        (["-m", "stage=dit", "seed=1,2", "out=here"], "a sweep names its jobs' folders itself"),
        (["stage=dit", "requeues=-1"], "requeues=-1: must be at least 0"),
    ],
)
def test_what_the_launcher_cannot_do_is_refused_before_anything_is_submitted(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=said):
        dispatch(words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [["seed=1,2"], ["seed=1,2", "hydra/launcher=slurm"], []])
def test_a_folder_that_cannot_be_written_to_is_one_line_before_anything_starts(
    words: list[str], commands: list[list[str]], tmp_path: Path
) -> None:
    (tmp_path / "outputs").write_text("a file")
    with pytest.raises(
        DataError, match=r"outputs/default/vae/.*: cannot be written \(Not a directory\); give run=NAME"
    ):
        dispatch(["-m", "stage=vae", "machine=laptop", *words])
    assert not commands and [path.name for path in tmp_path.iterdir()] == ["outputs"]


def test_of_a_very_large_sweep_it_is_said_how_much_is_checked_beforehand(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("soratrain.sweep.CHECKED", 1)
    assert dispatch(["-m", "stage=vae", "machine=laptop", "seed=3,4"]) == 0
    assert "sweep: of 2 runs the first 1 are checked now, each of the others as it starts" in capsys.readouterr().err


def test_a_jobs_folder_does_not_depend_on_the_order_of_its_overrides() -> None:
    assert folder_hash(["a=1", "b=2", "fresh=true"]) == folder_hash(["b=2", "a=1"]) != folder_hash(["a=1", "b=3"])


def test_what_is_missing_upstream_is_named_before_a_job_waits_in_a_queue_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    said = r"inputs.latents=.*: missing or unfinished; make it first: python -m soratrain stage=encode(?!.*seed=)"
    with pytest.raises(DataError, match=said):
        dispatch(["-m", *SLURM, "seed=1,2"])
    assert [path.name for path in tmp_path.iterdir()] == ["sbatch"]


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that a sweep runs; one with seed=2 fails, the others are done with their seed as the loss."""
    found: list[list[str]] = []

    def run(words: list[str]) -> int:
        found.append(words)
        (out,) = [word.removeprefix("out=").strip('"') for word in words if word.startswith("out=")]
        seed = next((word.removeprefix("seed=") for word in words if word.startswith("seed=")), "0")
        if seed == "2":
            return 2
        Path(out).mkdir(parents=True, exist_ok=True)
        (Path(out) / "result.json").write_text(f'{{"loss": {seed}}}')
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["soratrain"])
    monkeypatch.setattr("soratrain.sweep.run_child", run)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")
    return found


def test_a_run_that_fails_does_not_stop_the_others_and_is_named(commands: list[list[str]]) -> None:
    with pytest.raises(
        DataError, match="1 of 3 runs failed: stage=vae seed=2 .ended with exit code 2; why stands above"
    ):
        dispatch(["-m", "stage=vae", "machine=laptop", "seed=1,2,3"])
    assert len(commands) == 3 and len({word for words in commands for word in words if word.startswith("out=")}) == 3
    assert all("outputs/default/vae/sweep/" in words[-1] for words in commands)


@pytest.mark.parametrize(
    ("words", "out"),
    [
        (["stage=vae"], "outputs/default/vae/base"),
        (["stage=dit", "+experiment=video_256", "run=big"], "outputs/big/dit/video_256"),
        (["stage=vae", "out=elsewhere"], "elsewhere"),
    ],
)
def test_one_run_with_m_is_the_run_without_it(commands: list[list[str]], words: list[str], out: str) -> None:
    assert dispatch(["-m", "machine=laptop", *words]) == 0
    (command,) = commands
    assert f'out="{out}"' in command and Path(out, "result.json").is_file()
