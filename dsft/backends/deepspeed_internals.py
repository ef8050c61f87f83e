"""Internals of DeepSpeed that its public API does not cover, read in 0.19.8. setup.py excludes the next minor version.

`zero` is the engine's optimizer, a DeepSpeedZeroOptimizer_Stage3 around the one that was passed to
`deepspeed.initialize`. A parameter's partition is the part of the flattened tensor that this rank holds: equally long
on all ranks, padded at the end.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from dsft.backends.base import MOMENTS


def disable_shm_build() -> None:
    """Keep `init_distributed` from compiling its shared-memory collective, which only inference uses.

    On CPU that takes half a minute and a C++ compiler, and a build that is killed leaves a lock file on which the next
    one waits forever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def full_shape(parameter: Any) -> tuple[int, ...]:
    """Shape before partitioning."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def partition_range(parameter: Any) -> tuple[int, int]:
    """Start and stop of this rank's partition in the flattened tensor, without padding."""
    size = parameter.ds_tensor.ds_numel
    start = size * torch.distributed.get_rank()
    return min(start, parameter.ds_numel), min(start + size, parameter.ds_numel)


def padded(values: torch.Tensor, parameter: Any) -> torch.Tensor:
    """Values of this rank's partition, padded to its length."""
    whole = torch.zeros(parameter.ds_tensor.ds_numel, dtype=torch.float32)
    whole[: values.numel()] = values
    return whole.to(parameter.device)


def reset_moments(zero: Any, step: int) -> None:
    """Zero moments for every group of partitions, with the step count of AdamW."""
    for flat in zero.fp32_partitioned_groups_flat:
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        zero.optimizer.state[flat] = {"step": torch.tensor(float(step))} | moments


def write_masters(
    zero: Any, parameters: dict[str, nn.Parameter], read: Callable[[str, int, int], torch.Tensor]
) -> None:
    """Set the float32 master weights and the compute weights derived from them, as the engine's own step does.

    Args:
        zero: see above.
        parameters: all trained parameters.
        read: (name, start, stop) -> values of the flattened parameter.
    """
    from deepspeed.utils import safe_set_local_fp32_param

    zero._partition_all_parameters()
    for name, parameter in parameters.items():
        safe_set_local_fp32_param(parameter, padded(read(name, *partition_range(parameter)), parameter))
    for group in range(len(zero.fp16_groups)):
        zero._reassign_or_swap_out_partitioned_parameters(group)
    if zero.persistent_parameters:
        zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
