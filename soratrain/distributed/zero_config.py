"""DeepSpeed's config, from our typed options: the one place that knows its keys."""

from __future__ import annotations

from typing import Any

from soratrain.distributed.options import StrategyOptions


def deepspeed_config(options: StrategyOptions, *, device_type: str) -> dict[str, Any]:
    """Return the config for ZeRO stage `options.zero`; clipping and accumulation are the trainer's to add.

    Autocast is not in it: it is ours, around the whole step. Under offload the optimizer stays the one that the config
    of the run names, and torch steps it on the CPU: its fused AdamW is as fast there as DeepSpeed's own (see
    `tests/bench/bench_offload.py`), which wants a C++ compiler on every node.

    Args:
        options: with a ZeRO stage.
        device_type: `cpu` or `cuda`, where nets compute.
    """
    zero: dict[str, Any] = {
        "stage": options.zero,
        "reduce_bucket_size": options.bucket,
        "allgather_bucket_size": options.bucket,
        "contiguous_gradients": True,
        "overlap_comm": device_type == "cuda",
    }
    if options.zero == 3:
        zero["stage3_prefetch_bucket_size"] = options.bucket
        zero["stage3_max_live_parameters"] = zero["stage3_max_reuse_distance"] = options.live
    host = {"device": "cpu", "pin_memory": device_type == "cuda"}
    if options.offload:
        zero["offload_optimizer"] = host
        if options.zero == 3:
            zero["offload_param"] = host
    config: dict[str, Any] = {
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "communication_data_type": options.reduce,
        "data_types": {"grad_accum_dtype": "fp32"},
        "train_micro_batch_size_per_gpu": 1,  # for DeepSpeed's own throughput figures, which nobody reads
        "steps_per_print": 1 << 30,
    }
    if options.weights == "bf16":
        config["bf16"] = {"enabled": True}
    return config
