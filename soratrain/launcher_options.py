"""What may be said of a SLURM job: the keys of `hydra.launcher`, and what submitit is told of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from soratrain import slurm
from soratrain.errors import ConfigError
from soratrain.schema import suggest


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
                "job=$SLURM_JOB_ID",
                'if [ -n "$SLURM_ARRAY_TASK_ID" ]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi',
                f'if [ "$code" = {slurm.AGAIN} ]; then scontrol requeue "$job"; fi',
                'exit "$code"',
            ],
            "slurm_additional_parameters": {"requeue": True, **self.additional_parameters},
            "stderr_to_stdout": True,
        }
        return {key: value for key, value in own.items() if value is not None}
