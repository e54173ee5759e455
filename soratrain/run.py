"""Run one stage: settle the machine, check the config, see to what is upstream, build the objects, run them."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from soratrain import again, outputs, slurm, slurm_folder, upstream
from soratrain.compose import compose, split_override
from soratrain.errors import ConfigError, DataError, UserError
from soratrain.quoting import literal
from soratrain.rules import validate

log = logging.getLogger(__name__)


def detect_machine(overrides: Sequence[str]) -> tuple[str, str]:
    """Return `laptop` or `gpu`, and why: a cluster's launcher implies GPUs, since a login node has none."""
    if (
        any(item.startswith("hydra/launcher=") and "slurm" in item for item in overrides)
        or "SLURM_JOB_ID" in os.environ
    ):
        return "gpu", "a SLURM job"
    import torch

    if torch.cuda.is_available():
        return "gpu", f"{torch.cuda.device_count()} CUDA device(s)"
    return "laptop", "no CUDA device"


def prepare(overrides: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the validated config and the overrides with the machine settled.

    `machine=auto` becomes what the run's folder was begun with, else what is found here; a folder that a stage only
    passes through (`once: false`) binds nothing.

    Raises:
        ConfigError: anything that the config system refuses.
    """
    asked = [split_override(item)[1] for item in overrides if split_override(item)[0] == "machine"]
    settled = [item for item in overrides if split_override(item)[0] != "machine"]
    if "SLURM_JOB_ID" in os.environ and not any(split_override(item)[0] == "upstream" for item in settled):
        settled.append("upstream=fail")  # a job's GPUs do not wait while one of them makes something else
    chosen = [item for item in asked[-1:] if item != "auto"]
    machine, why = (chosen[0], "as asked") if chosen else detect_machine(overrides)
    config, _ = compose([*settled, f"machine={machine}"])
    goes_on = config["stage"].get("once", True) and not config["fresh"]
    old = outputs.stored_config(Path(config["out"])) if goes_on else None
    if old and not chosen and old["machine"]["name"] != machine:
        machine, why = old["machine"]["name"], "as this run was begun"
        config, _ = compose([*settled, f"machine={machine}"])
    settled.append(f"machine={machine}")
    if config["machine"]["precision"] == "auto":
        precision = old["machine"]["precision"] if old else detect_precision()
        settled.append(f"machine.precision={precision}")
        config, _ = compose(settled)
    validate(config)
    config["machine"]["chosen"] = f"{machine}, {why}; precision {config['machine']['precision']}"
    return config, settled


def detect_precision() -> str:
    """Return `bf16-mixed` where the CPU has bf16 matrix tiles (AMX), else `32-true`, which is then the faster one."""
    import torch

    return "bf16-mixed" if torch.cpu._is_amx_tile_supported() else "32-true"


def global_rank() -> int:
    """Return this process's rank, before any process group exists.

    SLURM's word counts where srun started this process; others inherit it from the batch script or shell.
    """
    names = ("RANK", "SLURM_PROCID", "LOCAL_RANK") if slurm.in_step() else ("RANK", "LOCAL_RANK")
    return next((int(os.environ[name]) for name in names if os.environ.get(name, "").isdigit()), 0)


def start_logging() -> None:
    """Say on the terminal what happens."""
    root = logging.getLogger("soratrain")
    root.setLevel(logging.INFO)
    root.propagate = False
    console = logging.StreamHandler()
    console.setFormatter(logging.Formatter("%(message)s"))
    root.handlers = [console]


def log_to(path: Path) -> None:
    """Say it in a file as well."""
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger("soratrain").addHandler(file)


def plain(node: Any) -> Any:
    """Return a resolved node in which Hydra finds nothing more to resolve: a prompt may hold `${`.

    Hydra resolves a node in place and then reads it, which resolves it again; so a text is escaped twice.
    """
    if isinstance(node, Mapping):
        return {key: plain(value) for key, value in node.items()}
    if isinstance(node, list):
        return [plain(value) for value in node]
    return literal(literal(node)) if isinstance(node, str) else node


def instantiate(node: Mapping[str, Any]) -> Any:
    """Build the object that a config node describes; nets come as factories (`_partial_`).

    Raises:
        UserError: what the object itself says of its values.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate as hydra_instantiate

    try:
        return hydra_instantiate(plain(node), _convert_="all")
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from error
        if isinstance(cause, ValueError):
            raise ConfigError(f"{node['_target_']}: {cause}") from error
        raise


def run(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Run the stage that `config` describes, or go on with it; return its result.

    In a SLURM job that is stopped before it is done, it sees to it that the job starts again.

    Raises:
        UserError: something that the user can mend.
    """
    with slurm.going_on(config["requeues"], global_rank()):
        return run_stage(config, overrides)


def run_stage(config: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Run the stage that `config` describes, or go on with it; return its result.

    What the values themselves make impossible is found first: before anything upstream is made, before the folder is
    touched. What the data make impossible is found later; a folder in which nothing was made by then is given up.

    Raises:
        UserError: something that the user can mend.
    """
    out, stage, first = Path(config["out"]), config["stage"], global_rank() == 0
    once = stage.get("once", True)
    start_logging()
    check_machine(config)
    outputs.check_writable(out, probe=first)  # on every rank, so that none waits for one that cannot, and which says so
    if stage["kind"] == "fit":
        trainer, alone = config["trainer"], config["strategy"]["name"] == "single"
        slurm.check_tasks(trainer["num_nodes"], trainer["devices"], single=alone)
    fresh = bool(config["fresh"])
    if fresh and slurm_folder.begun_before(out):
        config = {**config, "fresh": False}
    shared = stage["kind"] != "fit" and stage.get("shared", False)
    together = sharing(config, overrides) if shared else nullcontext()
    work = training(config) if stage["kind"] == "fit" else instantiate(stage["job"])
    if first:
        log.info("machine: %s", config["machine"]["chosen"])
        upstream.ensure(config, overrides)
        if once:
            slurm_folder.check_free(out)
        outputs.claim(out, config, compare=once)
        if once:
            slurm_folder.begin(out)
        log_to(out / "log.txt")
        if once:
            first_weights = upstream.begun_from(config)
            outputs.bind_upstream(out, upstream.needed(config) + ([("init", first_weights)] if first_weights else []))
    again.began(fresh=fresh)
    done = outputs.stored_result(out) if once and (first or not config["fresh"]) else None  # fresh: about to be removed
    if done is not None:
        log.info("stage=%s is done in %s (fresh=true would start it over)", stage["name"], out)
        return done
    if stage["kind"] != "fit" and not shared and not first:
        return {}  # such a job is one process's work
    began = time.monotonic()
    with reasons_in(out) if first and once else nullcontext():
        try:
            with together:
                metrics = work()
        except OSError as error:
            raise DataError(f"{error.filename or out}: {error.strerror or error}") from error
    result = {**metrics, "stage": stage["name"], "seconds": round(time.monotonic() - began, 1)}
    if first:
        outputs.finish(out, result)
        told = {
            key: value
            for key, value in result.items()
            if not key.startswith(("captions_", "modes_")) or key == "captions_per_s"
        }  # in a line of their own
        figures = {key: value for key, value in told.items() if not isinstance(value, dict | list)}
        log.info("%s", "  ".join(f"{key} {shown(value)}" for key, value in figures.items()))
    return result


@contextmanager
def reasons_in(out: Path) -> Iterator[None]:
    """Keep in a run's folder why it has ended early, whichever of its processes was the first to; not why it stopped.

    A folder in which nothing was made yet is given up, where the user can mend the reason.
    """
    from soratrain.distributed import halt

    with halt.kept(partial(outputs.fail, out)):
        try:
            yield
        except UserError as error:
            outputs.fail(out, str(error))
            outputs.release(out)
            raise
        except Exception as error:
            outputs.fail(out, f"{type(error).__name__}: {error}".strip().splitlines()[0])
            raise


def processes(config: Mapping[str, Any]) -> int:
    """Return how many processes of this node share a job: as many as would train."""
    from soratrain.distributed.trainer import resolve_device, resolve_devices

    trainer = config["trainer"]
    device = resolve_device(trainer["accelerator"])
    return resolve_devices(trainer["devices"], instantiate(config["strategy"]), device)


def sharing(config: Mapping[str, Any], overrides: Sequence[str]) -> AbstractContextManager[None]:
    """Return a context in which this node's processes share a job.

    Raises:
        ConfigError: they are too few, or too many, to share the tokens of each clip as is asked.
    """
    from soratrain.distributed.mesh import check_ranks
    from soratrain.distributed.ranks import number, started

    launched = number("WORLD_SIZE", "SLURM_STEP_NUM_TASKS") or 1  # by torchrun or srun, which count then
    said = f"trainer.devices={config['trainer']['devices']}, strategy={config['strategy']['name']}"
    count = launched if launched > 1 else processes(config)
    check_ranks(config["parallel"]["sequence"], count, "as they were launched" if launched > 1 else said)
    return started(count, overrides)


def check_machine(config: Mapping[str, Any]) -> None:
    """Refuse the sizes meant for GPUs where there is none.

    Raises:
        ConfigError: says how to insist.
    """
    import torch

    if config["stage"].get("dry"):
        return
    wants_gpu = config["machine"]["name"] == "gpu" and config["trainer"]["accelerator"] == "auto"
    if wants_gpu and not torch.cuda.is_available():
        raise ConfigError(
            "machine=gpu: no CUDA device is here; use machine=laptop, or insist with trainer.accelerator=cpu"
        )


def shown(value: Any) -> str:
    """Return a result's value for the terminal."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def check_nets(factories: Mapping[str, Callable[[], Any]]) -> None:
    """Build every net once without memory, so that sizes that cannot be are found before a folder is touched.

    Raises:
        ConfigError: names the net and what does not go together.
    """
    import torch

    for name, factory in factories.items():
        try:
            with torch.random.fork_rng(devices=[]), torch.device("meta"):
                factory()
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from error


def training(config: Mapping[str, Any]) -> Callable[[], dict[str, Any]]:
    """Build a training run; calling it trains, from the newest checkpoint if there is one, to the last metrics."""
    import lightning as L

    from soratrain.distributed.fit import fit

    L.seed_everything(config["seed"], verbose=False)
    module = instantiate(config["stage"]["module"])
    check_nets(module.factories)
    data = instantiate(config["stage"]["data"])
    trainer = instantiate(config["trainer"])()

    def train() -> dict[str, Any]:
        if config["init"]:
            for name in module.factories.keys() - set(module.helpers):
                try:
                    module.start_from(name, config["init"])
                except DataError as error:
                    raise DataError(f"init={config['init']}: {error}") from error
        return fit(trainer, module, data)

    return train
