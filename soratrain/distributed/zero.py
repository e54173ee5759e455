"""ZeRO by DeepSpeed under Lightning, mended, on GPUs and (for tests, over gloo) on CPUs.

What differs from Lightning's own strategy:
- It runs on CPUs: the checks for CUDA are skipped, and DeepSpeed is told which accelerator to use before its import.
- Lightning's closure divides the loss by the number of accumulated micro-batches and DeepSpeed's engine does it again,
  which makes gradients too small by that factor; the engine is told not to.
- Inputs stay as they are: rounding coordinates and noise levels to bf16 would ruin them.
- bf16 is autocast with fp32 weights, as under DDP, so that both compute the same; messages stay fp32.
- Under ZeRO-3 a net is built whole on the CPU and then cut up, since inside DeepSpeed's own `zero.Init` a module's
  parameters are gone before its parent can initialize them: zero-initialized outputs would silently not be zero. So a
  rank's host memory holds one whole net while it is built; no device ever does.
- Checkpoints are ours: DeepSpeed's are pickles, which cannot be read safely and fit one number of ranks only.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from soratrain.distributed.fragments import Fragment
from soratrain.distributed.strategy import Restorable, StrategyOptions
from soratrain.errors import ConfigError
from soratrain.muon import Muon
from soratrain.optim import shape_of


class EnginePrecision(DeepSpeedPrecision):
    """Hands the loss to DeepSpeed's engine unscaled, and inputs to the module untouched."""

    def __init__(self) -> None:
        super().__init__("32-true")

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> Any:
        return nullcontext()  # the engine has an autocast of its own

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        model.trainer.model.backward(tensor, scale_wrt_gas=False)


class Sharded(Restorable, DeepSpeedStrategy):
    """ZeRO 1, 2 or 3."""

    skips = False  # a step happens inside the engine, and it takes one optimizer

    @property
    def root_device(self) -> torch.device:
        device = DDPStrategy.root_device.fget(self)  # type: ignore[attr-defined]
        return torch.device("cpu", 0) if device.type == "cpu" else device  # DeepSpeed wants an index

    @property
    def on_cpu(self) -> bool:
        return self.root_device.type == "cpu"

    def setup_environment(self) -> None:
        if self.on_cpu:
            DDPStrategy.setup_environment(self)
        else:
            super().setup_environment()

    def setup_distributed(self) -> None:
        if not self.on_cpu:
            super().setup_distributed()
            return
        backend = importlib.import_module("deepspeed.comm.torch")
        backend.build_shm_op = lambda: None  # type: ignore[attr-defined]  # its messages through shared memory want minutes of a C++ compiler
        reset_seed()
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    def init_deepspeed(self) -> None:
        """Start the engine.

        Raises:
            ConfigError: the optimizer needs whole matrices.
        """
        assert self.model is not None
        self._initialize_deepspeed_train(self.model)

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if isinstance(optimizer, Muon):
            raise ConfigError(
                "optimizer.name=muon needs whole matrices and ZeRO slices them; use adamw, or strategy=ddp"
            )
        from deepspeed.runtime.engine import DeepSpeedEngine

        if not self.zero_stage_3:
            for param in model.parameters():
                torch.distributed.broadcast(param.data, 0)
        DeepSpeedEngine._broadcast_model = lambda engine: None  # it cannot broadcast a parameter without dimensions
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        self._init_config_if_needed()
        yield  # `place` cuts nets up

    def place(self, net: nn.Module) -> None:
        if self.zero_stage_3:
            cut_up(net, self.config)

    @property
    def sharded_optimizer(self) -> Any:
        return self.deepspeed_engine.optimizer

    def base_optimizers(self) -> list[torch.optim.Optimizer]:
        return [self.sharded_optimizer.optimizer]

    def fragments(self) -> list[Fragment]:
        found = []
        for name, param in self.lightning_module.named_parameters():
            if hasattr(param, "ds_id"):
                found += self._stage3(name, param)
            elif not param.requires_grad:
                found.append(Fragment(name, param.shape, 0, param.numel(), param, trained=False))
            elif getattr(param, "_hp_mapping", None) is not None:  # None where no number of it is this rank's
                mapping = param._hp_mapping
                holder = self.sharded_optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
                address, place = mapping.lp_fragment_address, mapping.hp_fragment_address
                found.append(
                    Fragment(name, param.shape, address.start, address.numel, holder, place.start, replicated=False)
                )
        return found

    def _stage3(self, name: str, param: Any) -> list[Fragment]:
        shape, size = shape_of(param), param.ds_tensor.ds_numel
        start = size * self.global_rank
        numel = min(size, shape.numel() - start)  # the last slices of a parameter are padded
        if numel <= 0:
            return []
        if not param.requires_grad:
            return [Fragment(name, shape, start, numel, param.ds_tensor, trained=False, replicated=False)]
        optimizer = self.sharded_optimizer
        group, offset, _ = optimizer.grad_position[param.ds_id]
        holder = optimizer.fp32_partitioned_groups_flat[group]
        return [Fragment(name, shape, start, numel, holder, offset, replicated=False)]

    def publish(self) -> None:
        optimizer = self.sharded_optimizer
        if self.zero_stage_3:
            for index, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
                optimizer.fp16_partitioned_groups_flat[index].data.copy_(flat.data)
                parts = optimizer.unflatten(
                    optimizer.fp16_partitioned_groups_flat[index], optimizer.fp16_partitioned_groups[index]
                )
                for param, part in zip(optimizer.fp16_partitioned_groups[index], parts, strict=True):
                    param.data = part.data
            if optimizer.persistent_parameters:  # small ones that stay gathered
                optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
                optimizer.persistent_parameters[0].all_gather(optimizer.persistent_parameters)
        else:
            optimizer.update_lp_params()


def cut_up(net: nn.Module, config: Any) -> None:
    """Leave each rank its slice of every parameter of `net`, which all ranks have built alike (ZeRO-3)."""
    import deepspeed

    class Init(deepspeed.zero.Init):
        def _zero_init_param(self, param: Any) -> None:
            if param.dim():
                super()._zero_init_param(param)
            else:  # DeepSpeed would broadcast it as bytes, which a tensor without dimensions cannot be viewed as
                torch.distributed.broadcast(param.data, 0)
                self._convert_to_deepspeed_param(param)
                param.partition()

    Init(module=net, config_dict_or_path=config)


def build_zero(options: StrategyOptions, *, device_type: str, precision: str, timeout: timedelta) -> Sharded:
    """Return the strategy for ZeRO stage `options.zero`."""
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    zero = {
        "stage": options.zero,
        "reduce_bucket_size": options.bucket,
        "allgather_bucket_size": options.bucket,
        "contiguous_gradients": True,
        "overlap_comm": device_type == "cuda",
    }
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_optimization": zero,
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput figures, which nobody reads
        "steps_per_print": 1 << 30,
    }
    if precision == "bf16-mixed":
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return Sharded(
        config=config,
        precision_plugin=EnginePrecision(),
        timeout=timeout,
        logging_level=logging.ERROR,
    )
