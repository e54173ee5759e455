"""hydra/launcher=slurm: each job of a sweep, or a single run, as a SLURM job through submitit.

On the login node: what is done already is not submitted, what another command has submitted is waited for, the rest
goes into one job array. In each task of a job the command runs that anyone could type, in a process of its own; what it
says goes into its run's folder, `logs/rank-00000.log` and so on. How a job is stopped and starts again is in slurm.py.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from soratrain import again, outputs, slurm, slurm_folder
from soratrain.amounts import counted
from soratrain.errors import ConfigError
from soratrain.launcher_options import Options
from soratrain.launcher_task import why, work
from soratrain.sweep import Run, failed, metric_of, run_of
from soratrain.sweep_runs import compared, diverged, record

TARGET = "hydra_plugins.soratrain.SlurmLauncher"  # Hydra takes launchers from this package only, and a name for one
POLLS = (1.0, 10.0, 60.0)  # seconds between two looks at the queue, at first and later, and when later begins
# Why a job waits that SLURM would never start; it says so only after it has taken it.
NEVER = (
    "PartitionNodeLimit",
    "PartitionTimeLimit",
    "PartitionConfig",
    "BadConstraints",
    "InvalidAccount",
    "InvalidQOS",
)


class SlurmLauncher(Launcher):
    """Starts runs as SLURM jobs and waits for them."""

    def __init__(self, **node: Any) -> None:
        plain = {
            key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in node.items()
        }
        self.options = Options.of(plain)
        self.load: Any = None
        self.unproved: set[str] = set()  # jobs that this command has submitted and that have never run

    def setup(self, *, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.load = lambda overrides: hydra_context.config_loader.load_sweep_config(config, list(overrides))

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        """Return the metric of each run, NaN where there is none.

        Raises:
            ConfigError: SLURM does not take the jobs.
        """
        runs = [run_of(overrides, self.load(overrides)) for overrides in job_overrides]
        jobs = {
            place: job
            for place, run in enumerate(runs)
            if (job := slurm_folder.worker(run.out).get("job")) and slurm.alive(job)
        }
        for place, job in jobs.items():
            tell(f"{runs[place].called}: job {job}, submitted earlier, works on it")
        left = [place for place, run in enumerate(runs) if place not in jobs and (run.fresh or not run.done)]
        if left:
            jobs |= dict(zip(left, self.submit([runs[place] for place in left]), strict=True))
        for place, run in enumerate(runs):
            if place not in jobs:
                tell(f"{run.called}: is done in {run.out}")
        try:
            self.watch({job: runs[place] for place, job in jobs.items()})
        except KeyboardInterrupt:
            numbers = " ".join(sorted({job.split("_")[0] for job in jobs.values()}))
            tell(again.told(f"the jobs go on; the same command waits for them again, and scancel {numbers} ends them"))
            raise
        return [self.returned(overrides, run) for overrides, run in zip(job_overrides, runs, strict=True)]

    def submit(self, runs: Sequence[Run]) -> list[str]:
        """Submit a job for each run, several as one array; return their numbers.

        Raises:
            ConfigError: SLURM refuses them, in its own words.
        """
        import submitit

        options, folder = self.options, Path(self.options.submitit_folder).resolve()
        for run in runs:
            outputs.check_writable(run.out)  # where SLURM has taken a job, it is too late
        try:
            python = {"slurm_python": options.python} if options.python else {}
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm", **python)
            executor.update_parameters(**options.parameters())
            with executor.batch():
                jobs = [executor.submit(work, list(run.words), str(run.out.resolve())) for run in runs]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, RuntimeError, ValueError) as error:
            raise refusal(" ".join(str(error).split())[-300:], options) from error
        self.unproved |= {job.job_id for job in jobs}
        for job, run in zip(jobs, runs, strict=True):
            slurm_folder.assign(run.out, job=job.job_id, log=str(job.paths.stdout))
            record(run.out, run.given, here=False)
            if run.fresh:
                (run.out / "result.json").unlink(missing_ok=True)  # of what the job starts over
        each = f"{counted(options.nodes, 'nodes')} × {counted(options.tasks_per_node, 'tasks')}"
        gpus = f", {options.gpus_per_node} GPUs a node" if options.gpus_per_node else ""
        what = f"an array of {len(jobs)} jobs, each of " if len(jobs) > 1 else "a job of "
        tell(f"{jobs[0].job_id.split('_')[0]}: {what}{each}{gpus}, {options.timeout_min} minutes at a time")
        for job, run in zip(jobs, runs, strict=True):
            tell(f"{job.job_id}: {run.called} → {run.out}   log: {run.out / 'logs' / 'rank-00000.log'}")
        return [job.job_id for job in jobs]

    def watch(self, jobs: Mapping[str, Run]) -> None:
        """Say what becomes of the jobs until all have ended; where nobody waits, only what SLURM says at once.

        Raises:
            ConfigError: SLURM would never start one of them.
        """
        seen: dict[str, str] = {}
        began, waiting = time.monotonic(), dict(jobs)
        while waiting:
            waited = time.monotonic() - began
            time.sleep(POLLS[0] if waited < POLLS[2] else POLLS[1])
            if (states := queue(list(waiting))) is None:
                continue  # SLURM does not answer for a while
            for job in list(waiting):
                state = states.get(job, "ended")
                if state != seen.get(job):
                    self.changed(job, waiting[job], state)
                seen[job] = state
                if state == "ended":
                    del waiting[job]
            if not self.options.wait and waited > 2 * POLLS[0]:
                tell(again.told("not waiting (hydra.launcher.wait=false); the same command shows how far they are"))
                return

    def returned(self, overrides: Sequence[str], run: Run) -> JobReturn:
        """Return to Hydra what came of a run."""
        if not run.done and self.options.wait:
            failed.append(f"{run.called}: {why(run.out)}")
        result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        result.return_value = metric_of(run.out) if run.done else math.nan
        return result

    def changed(self, job: str, run: Run, state: str) -> None:
        """Say that a job's state is another one.

        Raises:
            ConfigError: SLURM would never start it; its whole array is cancelled. Not so one that has run before, or
                that another command has submitted: a node of the partition is down or drained, and comes back.
        """
        if state == "ended":
            tell(f"{job}: {told(run)}")
            return
        tell(f"{job}: {state}")
        if state.startswith(("runs", "stops")):
            self.unproved.discard(job)
        if any(reason in state for reason in NEVER) and job in self.unproved and not restarted(job):
            subprocess.run(["scancel", job.split("_")[0]], capture_output=True, check=False)
            reason = state.removeprefix("waits (").removesuffix(")")
            raise refusal(f"it would never start job {job} ({reason}), which is cancelled", self.options)


def restarted(job: str) -> bool:
    """Return whether SLURM has started a job more than once, where it says so."""
    return slurm.facts("job", job).get("Restarts", "0") != "0"


def told(run: Run) -> str:
    """Return in words what came of a run whose job has ended."""
    result = outputs.stored_result(run.out)
    if result is None:
        return f"ended before it was done: {why(run.out)}"
    name, metric = compared(result)
    lost = diverged(result)
    return f"is done, but has {lost}" if lost else f"is done{'' if math.isnan(metric) else f', {name} {metric:.6g}'}"


def tell(words: str) -> None:
    """Say something on the terminal."""
    sys.stderr.write(f"slurm: {words}\n")
    sys.stderr.flush()


def refusal(said: str, options: Options) -> ConfigError:
    """Return the error of jobs that SLURM does not take."""
    asked = f"partition={options.partition or 'the default'}, {counted(options.nodes, 'nodes')}"
    asked += f" of {counted(options.tasks_per_node, 'tasks')}"
    asked += f" and {options.gpus_per_node or 'no'} GPUs"
    return ConfigError(
        f"hydra/launcher=slurm: SLURM refuses what is asked for ({asked}): {said}; sinfo shows what there is: change"
        " hydra.launcher.partition and its like, trainer.num_nodes or trainer.devices"
    )


def queue(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return in words what each of the jobs that have not ended does; None where SLURM does not answer."""
    found = slurm.queued(jobs)
    return None if found is None else {item.job: in_words(item) for item in found}


def in_words(item: slurm.Queued) -> str:
    """Return in words what a job does."""
    if item.state == "COMPLETING":
        return "stops"
    if item.state in ("RUNNING", "SIGNALING", "CONFIGURING"):
        return f"runs on {item.nodes}"
    return "waits to start again" if item.reason == "BeginTime" else f"waits ({item.reason})"


def prepared(node: Mapping[str, Any]) -> None:
    """Check, before anything is submitted, that there is a SLURM here and that the launcher's keys are right.

    Raises:
        ConfigError: there is none, or they are not.
    """
    Options.of(node)
    if shutil.which("sbatch") is None:
        raise ConfigError(
            "hydra/launcher=slurm: there is no sbatch on this machine; run it on a login node, or leave hydra/launcher"
            " out"
        )
    Plugins.instance().class_name_to_class[TARGET] = SlurmLauncher
