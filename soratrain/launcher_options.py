"""What may be said of a SLURM job: the keys of `hydra.launcher`, and what submitit is told of them."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from typing import Any

from soratrain import slurm
from soratrain.errors import ConfigError
from soratrain.schema import suggest

ANSWER = 30  # seconds that a node has to answer
TERMINATED = 128 + signal.SIGTERM  # the exit code of a process that SIGTERM has ended; one that listens ends otherwise
EARLY = 120  # seconds of a start within which that may have been an order for the start before
LEAST = {"signal_delay_s": 0, "requeues": 0}  # of the numbers; 1 of the others
EXAMPLES = {"setup": "['module load cuda']", "srun_args": "['--mpi=none']"}


def teardown(requeues: int) -> list[str]:
    """Return what a job's script does after srun: it starts the job again, at most `requeues` times, for three reasons.

    A process that cannot reach SLURM, in a container say, has asked for it. Or the job has failed while some of its
    nodes, not all, answer no more: a node that is shut down ends its processes, and with them the job, before SLURM
    misses it. Or the job had just started again and its processes were terminated before they could listen: when a lost
    node comes back, SLURM may still send it the order to end the start before, once. A job that was cancelled, or that
    fails on nodes that are well, does not start again.
    """
    return f"""\
code=$?
again=
start=$((${{SLURM_RESTART_COUNT:-0}} + 1))
job=$SLURM_JOB_ID
if [ -n "$SLURM_ARRAY_TASK_ID" ]; then job=${{SLURM_ARRAY_JOB_ID}}_$SLURM_ARRAY_TASK_ID; fi
answers() {{ timeout {ANSWER} srun --overlap --quiet --nodes=1 --ntasks=1 --nodelist="$1" true && echo "$1"; }}
nodes() {{ for node in $(scontrol show hostnames "$SLURM_JOB_NODELIST"); do answers "$node" & done; wait; }}
case "$code" in
0 | 2 | 130) ;;
{slurm.AGAIN}) again=yes ;;
*)
  said="exit code $code of start $start"
  facts=$(scontrol show job "$job" -o 2>/dev/null)
  log=$(echo "$facts" | grep -o ' StdOut=[^ ]*' | cut -d= -f2)
  if [ "$code" = {TERMINATED} ] && [ "$start" -gt 1 ] && [ "$SECONDS" -lt {EARLY} ] &&
    ! grep -qsx "exit code {TERMINATED} of start $((start - 1))" "$log"; then
    again=yes
  elif [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    count=$(nodes 2>/dev/null | wc -l)
    said="$said; $count of $SLURM_JOB_NUM_NODES nodes answer"
    if [ "$count" -gt 0 ] && [ "$count" -lt "$SLURM_JOB_NUM_NODES" ]; then again=yes; fi
  fi
  echo "$said"
  case "$facts" in *JobState=RUNNING*) ;; *) again= ;; esac ;;
esac
if [ -n "$again" ]; then
  if [ "$start" -le {requeues} ]; then
    code={slurm.AGAIN}
    scontrol requeue "$job"
  else
    echo "SLURM job $job has started again $((start - 1)) times, as often as it may (requeues)"
  fi
fi
exit "$code"
""".splitlines()


def shown(value: Any) -> str:
    """Return a value as it is written on the command line, texts in quotes."""
    return {None: "null", True: "true", False: "false"}.get(value, repr(value)) if _plain(value) else repr(value)


def _plain(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def wrong(item: Field[Any], value: Any) -> str:
    """Return what the value of an option must be; empty where it is."""
    kind = str(item.type)
    if value is None and kind.endswith("| None"):
        return ""
    null = ", or null" if kind.endswith("| None") else ""
    if kind.startswith("int"):
        least = LEAST.get(item.name, 1)
        good = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if good else f"a whole number of at least {least}{null}"
    if kind.startswith("bool"):
        return "" if isinstance(value, bool) else "true or false"
    if kind.startswith("Sequence"):
        good = isinstance(value, list) and all(isinstance(word, str) for word in value)
        return "" if good else f"a list of texts, such as {EXAMPLES[item.name]}; [] for none"
    if kind.startswith("Mapping"):
        good = isinstance(value, Mapping) and all(
            _plain(word) or isinstance(word, str | int | float) for word in value.values()
        )
        return "" if good else "names and values: +hydra.launcher.additional_parameters.reservation=lab; {} for none"
    return "" if isinstance(value, str | int | float) and not isinstance(value, bool) else f"a word{null}"


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
    requeues: int = 100
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
        for item in fields(cls):
            if item.name in node and (mend := wrong(item, node[item.name])):
                raise ConfigError(f"hydra.launcher.{item.name}={shown(node[item.name])}: must be {mend}")
        made = cls(**{key: value for key, value in node.items() if key != "_target_"})
        if made.timeout_min * 60 < 2 * made.signal_delay_s:
            raise ConfigError(
                f"hydra.launcher.timeout_min={made.timeout_min} with"
                f" hydra.launcher.signal_delay_s={made.signal_delay_s}: a job would be told to stop when it has hardly"
                " begun; give it more minutes, or a shorter notice"
            )
        return made

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
            "slurm_teardown": teardown(self.requeues),
            "slurm_additional_parameters": {
                "requeue" if self.requeues else "no_requeue": True,
                **self.additional_parameters,
            },
            "stderr_to_stdout": True,
        }
        return {key: value for key, value in own.items() if value is not None}
