"""ZeRO by DeepSpeed under Lightning, mended, on GPUs and (for tests, over gloo) on CPUs.

What differs from Lightning's own strategy:
- It runs on CPUs: the checks for CUDA are skipped, and DeepSpeed is told which accelerator to use before its import.
- Lightning's closure divides the loss by the number of accumulated micro-batches and DeepSpeed's engine does it again,
  which makes gradients too small by that factor; the engine is told not to.
- Inputs stay as they are: rounding coordinates and noise levels to bf16 would ruin them.
- bf16 is autocast, as under DDP, so that both compute the same; whether weights and messages are fp32 or bf16 is an
  option of its own. DeepSpeed's autocast, which decides that as well, is left out.
- Under ZeRO-3 nets are cut up block by block as they are built (`cut.py`).
- Checkpoints are ours: DeepSpeed's are pickles, which cannot be read safely and fit one number of ranks only.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy
from torch import Tensor, nn

from soratrain.distributed.cut import cut_up, cut_up_as_built, fill
from soratrain.distributed.fragments import Fragment
from soratrain.distributed.options import StrategyOptions
from soratrain.distributed.strategy import Restorable
from soratrain.distributed.zero_config import deepspeed_config
from soratrain.errors import ConfigError
from soratrain.muon import Muon
from soratrain.optim import shape_of


class EnginePrecision(DeepSpeedPrecision):
    """Hands the loss to DeepSpeed's engine unscaled, and inputs and weights to the module untouched.

    Args:
        autocast: the type of device whose products are made in bf16; None for none.
    """

    def __init__(self, autocast: str | None) -> None:
        super().__init__("32-true")
        self.autocast = autocast

    def convert_module(self, module: nn.Module) -> nn.Module:
        return module  # its weights are of the type that the strategy has given them

    def convert_input(self, data: Any) -> Any:
        return data

    def forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.autocast, torch.bfloat16) if self.autocast else nullcontext()

    def backward(self, tensor: Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        model.trainer.model.backward(tensor, scale_wrt_gas=False)


class Sharded(Restorable, DeepSpeedStrategy):
    """ZeRO 1, 2 or 3, the optimizer on the device or in the host's memory."""

    skips = False  # a step happens inside the engine, and it takes one optimizer
    weights = torch.float32  # what the nets compute with

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
        exact = self.exact_weights() if self.weights != torch.float32 else {}
        self._initialize_deepspeed_train(self.model)
        for fragment in self.fragments():  # DeepSpeed's fp32 weights were made from those in bf16
            if fragment.trained and fragment.name in exact:
                start, values = exact[fragment.name]
                fragment.write(values[fragment.start - start :][: fragment.numel])

    def exact_weights(self) -> dict[str, tuple[int, Tensor]]:
        """Return the trained weights as they were drawn or loaded, before they are rounded to bf16: fp32, on the CPU.

        Under ZeRO-3 they are this rank's slices, which are then forgotten by their parameters.

        Returns:
            Where each begins in its parameter, and the flat values, by name.
        """
        found = {}
        for name, param in self.lightning_module.named_parameters():
            if hasattr(param, "exact"):
                found[name] = (param.ds_tensor.ds_numel * self.global_rank, param.exact)
                del param.exact
            elif param.requires_grad and not hasattr(param, "ds_id"):
                found[name] = (0, param.detach().cpu().flatten())
        return found

    def _setup_model_and_optimizer(self, model: Any, optimizer: Any, lr_scheduler: Any = None) -> Any:
        if isinstance(optimizer, Muon):
            raise ConfigError(
                "optimizer.name=muon needs whole matrices and ZeRO slices them; use adamw, or strategy=ddp"
            )
        from deepspeed.runtime import engine

        if not self.zero_stage_3:
            for param in model.parameters():
                torch.distributed.broadcast(param.data, 0)
        engine.DeepSpeedEngine._broadcast_model = (
            lambda engine: None  # it cannot broadcast a parameter without dimensions
        )
        engine.autocast_if_enabled = lambda engine: nullcontext()  # it would switch ours off
        return super()._setup_model_and_optimizer(model, optimizer, lr_scheduler)

    @contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        self._init_config_if_needed()
        yield  # `place` cuts nets up

    def building(self) -> AbstractContextManager[None]:
        return cut_up_as_built(self.config, self.weights) if self.zero_stage_3 else nullcontext()

    def place(self, net: nn.Module) -> None:
        if self.zero_stage_3:
            cut_up(net, self.config, self.weights)

    def fill(self, param: Tensor, values: Tensor) -> None:
        if hasattr(param, "ds_tensor"):
            fill(param, values, self.global_rank)
        else:
            super().fill(param, values)

    def computing(self) -> AbstractContextManager[Any]:
        return nullcontext() if self.weights == torch.float32 else self.precision_plugin.forward_context()

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


def build_zero(options: StrategyOptions, *, device_type: str, precision: str) -> Sharded:
    """Return the strategy for ZeRO stage `options.zero`.

    Raises:
        ConfigError: weights in bf16 without autocast, which sees to it that what they meet is bf16 too.
    """
    if options.weights == "bf16" and precision != "bf16-mixed":
        raise ConfigError(
            f"strategy.weights=bf16 with trainer.precision={precision}: weights in bf16 are computed with in bf16; use"
            " trainer.precision=bf16-mixed, or strategy.weights=fp32"
        )
    if device_type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    strategy = Sharded(
        config=deepspeed_config(options, device_type=device_type),
        precision_plugin=EnginePrecision(device_type if precision == "bf16-mixed" else None),
        timeout=options.timeout,
        logging_level=logging.ERROR,
    )
    strategy.weights = {"fp32": torch.float32, "bf16": torch.bfloat16}[options.weights]
    return strategy
