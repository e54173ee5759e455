"""From plain values to a Lightning trainer with everything that a run needs."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loops.fit_loop import _FitLoop

from soratrain import slurm
from soratrain.callbacks.checkpoint import Checkpoint, GracefulStop
from soratrain.callbacks.compiled import CompileBlocks
from soratrain.callbacks.ema import EMA
from soratrain.callbacks.export import Export
from soratrain.callbacks.finite import Finite
from soratrain.callbacks.foretold import Foretold
from soratrain.callbacks.metrics import Metrics
from soratrain.callbacks.progress import Progress
from soratrain.callbacks.sequence import ShareTokens
from soratrain.callbacks.throughput import Throughput
from soratrain.callbacks.watch import Watch
from soratrain.distributed.launcher import adopt
from soratrain.distributed.mesh import check_ranks
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.phases import Phases
from soratrain.distributed.strategy import Restorable, build_strategy
from soratrain.errors import ConfigError

log = logging.getLogger(__name__)

PRECISIONS = ("32-true", "bf16-mixed")  # fp16 needs loss scaling, and whatever has it and no bf16 is old
COMPILE = ("none", "blocks")
# Warnings of Lightning and DeepSpeed that a user of this package can do nothing about.
NOISE = (
    ".*`srun` command is available.*",
    ".*does not have many workers.*",
    ".*is smaller than the logging interval.*",
    ".*resuming from a checkpoint that ended.*",
    ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
    ".*lr_scheduler.step\\(\\).*before.*optimizer.step\\(\\).*",
    ".*Trying to infer the `batch_size`.*",
    ".*You have overridden the `LightningModule.*",
    ".*is in eval mode.*",
    ".*module\\(s\\) in eval mode.*",
    ".*No device id is provided via.*",
    ".*`broadcast_buffers` is deprecated.*",
    ".*`torch.distributed.\\w+` is deprecated.*",
    ".*`IterableDataset` has `__len__` defined.*",
)


def quieten() -> None:
    """Keep what libraries say to themselves out of the log."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning", "torch.distributed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)


def resolve_device(accelerator: str) -> str:
    """Return `cpu` or `cuda` for `auto`, `cpu`, `cuda` or `gpu`.

    Raises:
        ConfigError: an unknown one, or no CUDA device is here.
    """
    if accelerator not in ("auto", "cpu", "cuda", "gpu"):
        raise ConfigError(f"trainer.accelerator={accelerator!r} is unknown; use auto, cpu or cuda")
    if accelerator == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if accelerator != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"trainer.accelerator={accelerator}: there is no CUDA device here; use auto or cpu")
    return "cpu" if accelerator == "cpu" else "cuda"


def resolve_devices(devices: int | str, options: StrategyOptions, device_type: str) -> int:
    """Return how many processes run on this node: for `auto` every GPU, or one on CPUs.

    Raises:
        ConfigError: more than there are, or more than one under `single`.
    """
    there = torch.cuda.device_count() if device_type == "cuda" else (os.cpu_count() or 1)
    if devices == "auto" and options.name != "single":
        devices = slurm.tasks_per_node() or devices
    if devices == "auto":
        return there if device_type == "cuda" and options.name != "single" else 1
    if not isinstance(devices, int) or not 1 <= devices <= there:
        raise ConfigError(f"trainer.devices={devices}: use auto or a number from 1 to {there}, what this node has")
    if options.name == "single" and devices > 1:
        raise ConfigError(f"trainer.devices={devices} with strategy=single: use strategy=ddp, zero2 or zero3")
    return devices


def build_trainer(
    *,
    out: str | Path,
    max_steps: int,
    strategy: StrategyOptions | None = None,
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    sequence: int = 1,
    precision: str = "32-true",
    compile: str = "none",
    accumulate: int = 1,
    clip: float = 0.0,
    ema: float = 0.0,
    log_every: int = 10,
    checkpoint_every: int = 500,
    keep: int = 2,
    keep_best: int = 0,
    checkpoint_async: bool = True,
    elastic: bool = True,
    max_shard_gb: float = 5.0,
    export: str = "last",
    stall_minutes: float = 10.0,
    peak_tflops: float | None = None,
    title: str = "training",
    logger: Callable[..., list[Logger]] | None = None,
    validation: Callable[..., L.Callback] | None = None,
    previews: Callable[..., L.Callback] | None = None,
    callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """Return a trainer that writes `metrics.csv`, `checkpoints/` and, at the last step, `weights/` into `out`.

    Args:
        out: the stage's output folder.
        max_steps: optimizer steps in the whole run.
        strategy: how it spreads over processes; one process by default.
        accelerator: `auto`, `cpu` or `cuda`.
        devices: processes on each node; `auto` is every GPU, or one process on CPUs.
        num_nodes: nodes.
        sequence: ranks that share the tokens of each micro-batch of the DiT (Ulysses); they divide all ranks.
        precision: `32-true` or `bf16-mixed`.
        compile: `none`, or `blocks`: those of the DiT run compiled.
        accumulate: micro-batches of a rank in an optimizer step.
        clip: largest gradient norm, 0 for none.
        ema: decay of the weight average, 0 for none.
        log_every: steps a row of metrics.
        checkpoint_every: steps between checkpoints, 0 for the last step only.
        keep: newest checkpoints that stay.
        keep_best: those of the lowest `val_loss` that stay beside them.
        checkpoint_async: write checkpoints while training goes on, where there is memory for a copy.
        elastic: whether a run may go on with another number of ranks than its checkpoint was written by.
        export: whose weights go to `weights/`: of the `last` step, or of the `best` checkpoint that is kept.
        max_shard_gb: size, in 10^9 bytes, above which a net's exported weights are spread over several files.
        stall_minutes: a run of several processes in which nothing has moved for so long ends, and says which rank is
            behind; one process only says where it stands. A first step, checkpoints, validations, samples and exports
            may stand still for nine tenths of the strategy's `timeout_minutes`, if that is longer.
        peak_tflops: dense bf16 peak of one device, of which `mfu` is the share; None takes that of a known GPU.
        title: what the progress bar calls it.
        logger: called with `out`, returns further loggers.
        validation, previews: called with `out`, the metrics, the weight average and the precision; each returns the
            callback that measures, or draws, as training goes. What they report is in the row of the same step.
        callbacks: further ones, called after the built-in ones but before checkpoints.

    Raises:
        ConfigError: a value, or a combination of values, that cannot work here.
    """
    quieten()
    options, out = strategy or StrategyOptions(), Path(out)
    if precision not in PRECISIONS:
        raise ConfigError(f"trainer.precision={precision!r} is unknown; use one of {', '.join(PRECISIONS)}")
    if compile not in COMPILE:
        raise ConfigError(f"trainer.compile={compile!r} is unknown; use one of {', '.join(COMPILE)}")
    if compile != "none" and options.zero == 3:
        raise ConfigError(
            f"trainer.compile={compile} with strategy={options.name}: it gathers weights in hooks, which cannot be"
            " compiled; use strategy=zero2, or trainer.compile=none"
        )
    if max_steps < 1 or accumulate < 1 or log_every < 1 or num_nodes < 1:
        raise ConfigError(
            f"trainer.max_steps={max_steps}, accumulate={accumulate}, log_every={log_every} and num_nodes={num_nodes}"
            " must be at least 1"
        )
    if export not in ("last", "best"):
        raise ConfigError(f"trainer.export={export!r} is unknown; use last or best")
    if export == "best" and keep_best < 1:
        raise ConfigError(
            f"trainer.export=best with trainer.keep_best={keep_best}: none is kept; set trainer.keep_best=1"
        )
    if not 0 < max_shard_gb < math.inf:
        raise ConfigError(f"trainer.max_shard_gb={max_shard_gb}: must be above 0 and finite")
    if options.name == "single" and num_nodes > 1:
        raise ConfigError(f"trainer.num_nodes={num_nodes} with strategy=single: use strategy=ddp, zero2 or zero3")
    device_type = resolve_device(accelerator)
    phases = Phases()
    metrics = Metrics(out / "metrics.csv", every=log_every, throughput=Throughput(phases, peak_tflops))
    average = EMA(ema) if ema else None
    checkpoint = Checkpoint(
        out / "checkpoints",
        every=checkpoint_every,
        keep=keep,
        keep_best=keep_best,
        beside=checkpoint_async,
        timeout=options.timeout,
        moved=partial(phases.move, alike=False),
    )
    stop = GracefulStop(checkpoint)
    beside = {"out": out, "metrics": metrics, "ema": average, "precision": precision}
    count = resolve_devices(devices, options, device_type)
    check_ranks(sequence, count * num_nodes, f"trainer.devices={count}, trainer.num_nodes={num_nodes}")
    chosen = build_strategy(options, device_type=device_type, precision=precision)
    assert isinstance(chosen, Restorable)
    chosen.saver, chosen.elastic = checkpoint.saver, elastic
    chosen.sequence = sequence
    shared = [ShareTokens(options.timeout)] if sequence > 1 else []
    slurm.meet()
    trainer = L.Trainer(
        accelerator=device_type,
        devices=count,
        num_nodes=num_nodes,
        strategy=chosen,
        plugins=environments(),
        precision=None if options.zero else precision,  # type: ignore[arg-type]
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        logger=(logger(out=out) if logger else []) or False,
        profiler=phases,
        callbacks=[
            Watch(phases, minutes=stall_minutes, timeout=options.timeout),
            Foretold(options, average=bool(ema), half=precision == "bf16-mixed", cuda=device_type == "cuda"),
            *([average] if average else []),
            *([validation(**beside)] if validation else []),
            *([previews(**beside)] if previews else []),
            metrics,
            Progress(metrics, title=title),
            *shared,
            *([CompileBlocks()] if compile == "blocks" else []),
            *callbacks,
            Finite(),
            checkpoint,
            Export(
                out / "weights",
                average,
                largest=int(max_shard_gb * 1e9),
                best=checkpoint if export == "best" else None,
                stopping=stop.agreed,
                phases=phases,
            ),
            stop,
        ],
        default_root_dir=str(out),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        log_every_n_steps=log_every,
    )
    if slurm.in_job():  # what to do at a signal is GracefulStop's to say; Lightning's handlers wait for other ranks
        trainer._signal_connector.register_signal_handlers = lambda: None  # type: ignore[method-assign]
    trainer.fit_loop.__class__ = WholeLoop
    adopt(trainer)
    return trainer


class WholeLoop(_FitLoop):
    """Begins and ends a run that goes on at its last step too, since its weights may not be exported yet."""

    @property
    def skip(self) -> bool:
        return False


def environments() -> list[Any]:
    """Return how ranks learn of each other where srun started them; elsewhere Lightning finds out by itself."""
    if not slurm.in_job() or "SLURM_NTASKS" not in os.environ or slurm.torchrun():
        return []

    class Job(SLURMEnvironment):
        """SLURM's, which slurm.py has checked."""

        @staticmethod
        def _validate_srun_variables() -> None:
            pass

        def validate_settings(self, num_devices: int, num_nodes: int) -> None:
            pass

    return [Job(auto_requeue=False)]
