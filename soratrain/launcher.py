"""hydra/launcher=slurm: each job of a sweep, or a single run, as a SLURM job through submitit.

On the login node: what is done already is not submitted, what another command has submitted is waited for, the rest
goes into one job array. In each task of a job the command runs that anyone could type, in a process of its own; what it
says goes into its run's folder, `logs/rank-00000.log` and so on. How a job is stopped and starts again is in slurm.py.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import OmegaConf

from soratrain import slurm
from soratrain.errors import ConfigError
from soratrain.schema import suggest
from soratrain.sweep import Run, failed, given_of, metric_of, run_of
from soratrain.sweep_runs import record

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


@dataclass(frozen=True, kw_only=True)
class Options:
    """What `hydra.launcher.KEY` may say; see conf/hydra/launcher/slurm.yaml."""

    submitit_folder: str
    nodes: int = 1
    tasks_per_node: int = 1
    gpus_per_node: int | None = None
    cpus_per_task: int | None = None
    mem_gb: int | None = None
    timeout_min: int = 1440
    signal_delay_s: int = 300
    name: str = "soratrain"
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    exclude: str | None = None
    gres: str | None = None
    comment: str | None = None
    array_parallelism: int = 256
    setup: Sequence[str] = field(default_factory=list)
    srun_args: Sequence[str] = field(default_factory=list)
    python: str | None = None
    additional_parameters: Mapping[str, Any] = field(default_factory=dict)
    wait: bool = True

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> Options:
        """Return the options that a config node describes.

        Raises:
            ConfigError: a key that there is none, or a value that cannot be.
        """
        known = [item.name for item in fields(cls)]
        for key in node:
            if key not in (*known, "_target_"):
                raise ConfigError(
                    f"hydra.launcher.{key}={node[key]!r}: no such key; {suggest(str(key), known)}; what else sbatch"
                    " takes is +hydra.launcher.additional_parameters.KEY=VALUE"
                )
        for key in ("nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "timeout_min", "array_parallelism"):
            value = node.get(key, 1)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ConfigError(f"hydra.launcher.{key}={value!r}: must be a number of at least 1")
        for key in ("setup", "srun_args"):
            if not isinstance(node.get(key) or [], list):
                raise ConfigError(f"hydra.launcher.{key}={node[key]!r}: must be a list, such as ['module load cuda']")
        minutes, notice = node.get("timeout_min", cls.timeout_min), node.get("signal_delay_s", cls.signal_delay_s)
        if minutes * 60 < 2 * notice:
            raise ConfigError(
                f"hydra.launcher.timeout_min={minutes} with hydra.launcher.signal_delay_s={notice}: a job would be told"
                " to stop when it has hardly begun; give it more minutes, or a shorter notice"
            )
        return cls(**{key: value for key, value in node.items() if key != "_target_" and value is not None})

    def parameters(self) -> dict[str, Any]:
        """Return what submitit is told; what nobody has set is left to the cluster."""
        cpus = [f"--cpus-per-task={self.cpus_per_task}"] if self.cpus_per_task else []  # srun does not take sbatch's
        common = ("name", "timeout_min", "nodes", "tasks_per_node", "gpus_per_node", "cpus_per_task", "mem_gb")
        special = ("partition", "account", "qos", "constraint", "exclude", "gres", "comment", "array_parallelism")
        own = {key: getattr(self, key) for key in common}
        own |= {f"slurm_{key}": getattr(self, key) for key in (*special, "signal_delay_s")}
        own |= {
            "slurm_setup": list(self.setup) or None,
            "slurm_srun_args": ["--kill-on-bad-exit=1", *cpus, *self.srun_args],
            # a job whose process cannot reach SLURM, in a container say, has its script start it again
            "slurm_teardown": [
                "code=$?",
                f'if [ "$code" = {slurm.AGAIN} ]; then scontrol requeue "$SLURM_JOB_ID"; fi',
                'exit "$code"',
            ],
            "slurm_additional_parameters": {"requeue": True, **self.additional_parameters},
            "stderr_to_stdout": True,
        }
        return {key: value for key, value in own.items() if value is not None}


class SlurmLauncher(Launcher):
    """Starts runs as SLURM jobs and waits for them."""

    def __init__(self, **node: Any) -> None:
        plain = {
            key: OmegaConf.to_container(v, resolve=True) if OmegaConf.is_config(v) else v for key, v in node.items()
        }
        self.options = Options.of(plain)
        self.load: Any = None

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
            if (job := slurm.worker(run.out).get("job")) and slurm.alive(job)
        }
        for place, job in jobs.items():
            tell(f"{runs[place].called}: job {job}, which another command has submitted, works on it")
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
            tell(f"the jobs go on; the same command waits for them again, and scancel {numbers} ends them")
            raise
        return [self.returned(overrides, run) for overrides, run in zip(job_overrides, runs, strict=True)]

    def submit(self, runs: Sequence[Run]) -> list[str]:
        """Submit a job for each run, several as one array; return their numbers.

        Raises:
            ConfigError: SLURM refuses them, in its own words.
        """
        import submitit

        options, folder = self.options, Path(self.options.submitit_folder).resolve()
        try:
            python = {"slurm_python": options.python} if options.python else {}
            executor = submitit.AutoExecutor(folder=folder, cluster="slurm", **python)
            executor.update_parameters(**options.parameters())
            with executor.batch():
                jobs = [executor.submit(work, list(run.words), str(run.out.resolve())) for run in runs]
        except (submitit.core.utils.FailedJobError, subprocess.CalledProcessError, RuntimeError, ValueError) as error:
            raise refusal(" ".join(str(error).split())[-300:], options) from error
        for job, run in zip(jobs, runs, strict=True):
            slurm.assign(run.out, job=job.job_id)
            record(run.out, given_of(run), here=False)
            if run.fresh:
                (run.out / "result.json").unlink(missing_ok=True)  # of what the job starts over
        each = f"{options.nodes} node{'s' * (options.nodes > 1)} × {options.tasks_per_node} tasks"
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
                tell("not waiting (hydra.launcher.wait=false); the same command shows how far they are")
                return

    def returned(self, overrides: Sequence[str], run: Run) -> JobReturn:
        """Return to Hydra what came of a run."""
        if not run.done and self.options.wait:
            failed.append(f"{run.called}: {why(run)}")
        result = JobReturn(overrides=list(overrides), status=JobStatus.COMPLETED)
        result.return_value = metric_of(run.out) if run.done else math.nan
        return result

    def changed(self, job: str, run: Run, state: str) -> None:
        """Say that a job's state is another one.

        Raises:
            ConfigError: SLURM would never start it; its whole array is cancelled.
        """
        if state == "ended":
            metric = metric_of(run.out) if run.done else math.nan
            what = "is done" if run.done else f"ended before it was done: {why(run)}"
            tell(f"{job}: {what}{'' if math.isnan(metric) else f', {metric:.6g}'}")
            return
        tell(f"{job}: {state}")
        if any(reason in state for reason in NEVER):
            subprocess.run(["scancel", job.split("_")[0]], capture_output=True, check=False)
            raise refusal(f"it would never start job {job} ({state})", self.options)


def tell(words: str) -> None:
    """Say something on the terminal."""
    sys.stderr.write(f"slurm: {words}\n")
    sys.stderr.flush()


def refusal(said: str, options: Options) -> ConfigError:
    """Return the error of jobs that SLURM does not take."""
    asked = f"partition={options.partition or 'the default'}, {options.nodes} nodes of {options.tasks_per_node} tasks"
    asked += f" and {options.gpus_per_node or 'no'} GPUs"
    return ConfigError(
        f"hydra/launcher=slurm: SLURM refuses what is asked for ({asked}): {said}; sinfo shows what there is: change"
        " hydra.launcher.partition and its like, trainer.num_nodes or trainer.devices"
    )


def queue(jobs: Sequence[str]) -> dict[str, str] | None:
    """Return in words what each of the jobs that have not ended does; None where SLURM does not answer."""
    numbers = ",".join(sorted({job.split("_")[0] for job in jobs}))
    words = ["squeue", "--noheader", "--array", "--format=%i|%T|%r|%N", f"--jobs={numbers}"]
    try:
        answer = subprocess.run(words, capture_output=True, text=True, timeout=slurm.ASKED, check=False)
    except subprocess.TimeoutExpired:
        return None
    if answer.returncode and "Invalid job id" not in answer.stderr:
        return None
    states = {}
    for line in answer.stdout.splitlines():
        job, state, reason, nodes = line.strip().split("|")
        if state in ("RUNNING", "SIGNALING", "COMPLETING", "CONFIGURING"):
            states[job] = f"runs on {nodes}"
        else:
            states[job] = "waits to start again" if reason == "BeginTime" else f"waits ({reason})"
    return states


def why(run: Run) -> str:
    """Return why a run ended before it was done, from what its processes said last."""
    said: list[str] = []
    for log in sorted((run.out / "logs").glob("rank-*.log")):
        lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
        starts = [place for place, line in enumerate(lines) if line.startswith(HEAD)]
        lines = lines[starts[-1] + 1 :] if starts else lines
        errors = [line for line in lines if line.startswith("error:")]
        if errors:
            return f"{errors[0]} ({log})"
        said += [f"{lines[-1][:300]} ({log})"] if lines else []
    return said[0] if said else f"it said nothing; look into {run.out.parent}/.submitit and {run.out}/logs"


HEAD = "== SLURM job"


def work(words: Sequence[str], out: str) -> None:
    """Run a command in one task of a job and end with its exit code; what it says is kept in the run's folder.

    Signals are the command's business: submitit would start the job again before anything is saved.
    """
    for known in (*slurm.SIGNALS, signal.SIGCONT):
        signal.signal(known, lambda number, frame: None)
    environment = dict(os.environ)
    if cpus := os.environ.get("SLURM_CPUS_PER_TASK"):
        environment.setdefault("OMP_NUM_THREADS", cpus)
    rank, node = slurm.number("SLURM_PROCID") or 0, os.environ.get("SLURMD_NODENAME", "?")
    log = Path(out) / "logs" / f"rank-{rank:05d}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        size = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
        start = f"start {slurm.restarts() + 1}, rank {rank} of {size} on {node}, {time.strftime('%Y-%m-%d %H:%M:%S')}"
        file.write(f"{HEAD} {slurm.job_id()}, {start}: soratrain {' '.join(words)}\n")
        file.flush()
        child = subprocess.Popen([sys.executable, "-m", "soratrain", *words], stdout=file, stderr=file, env=environment)
        code = child.wait()
    if code:
        sys.exit(code if code > 0 else 128 - code)


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
